//! The `fulmen` command.

fn main() -> std::process::ExitCode {
    fulmen::cli::quiet_mesa();
    fulmen::cli::main()
}

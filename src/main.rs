//! The `fulmen` command.

fn main() -> std::process::ExitCode {
    fulmen::cli::main()
}

//! The `fulmen` command.

fn main() -> std::process::ExitCode {
    // Workaround: Mesa's device-select layer (22.3) prints "error: XDG_RUNTIME_DIR is invalid" for every instance where the
    // variable is not set, as in containers. It only looks for a display there. Remove with that Mesa.
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
    fulmen::cli::main()
}

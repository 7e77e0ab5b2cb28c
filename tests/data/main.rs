//! Tests against published files too large for the repository: the folder that FULMEN_DATA names. Without it they are
//! counted as ignored.

use std::path::PathBuf;

mod request;
mod tensor_lists;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let data = std::env::var_os("FULMEN_DATA").map(PathBuf::from);
    let mut trials = tensor_lists::trials(data.as_deref());
    trials.extend(request::trials(data.as_deref()));
    libtest_mimic::run(&arguments, trials).exit();
}

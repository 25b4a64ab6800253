//! The `weft` command. Everything of it is in the library, so that tests can reach it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_control_plane::cli::main()
}

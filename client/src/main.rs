//! The `plumb` command. What it can do is in `cli`; what it talks through is the library.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("plumb: {error}");
            return ExitCode::from(2);
        }
    };
    let code = runtime.block_on(cli::run());
    // A thread may still wait for standard input; it must not keep the process.
    runtime.shutdown_background();
    code
}

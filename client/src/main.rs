//! The `plumb` command. What it can do is in `cli`; what it talks through is the library.

mod cli;

#[tokio::main]
async fn main() -> std::process::ExitCode {
    cli::run().await
}

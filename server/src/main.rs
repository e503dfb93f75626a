//! `plumb-server`: see `plumb-server --help`.

use std::process::ExitCode;

use plumb_server::Config;

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    plumb_model::text::render_templates_apart();
    if let Some(code) = plumb_usage::answer(plumb_server::config::command(), std::env::args_os()) {
        return code;
    }
    match Config::parse(std::env::args_os()) {
        Ok(config) => plumb_server::run(config),
        Err(error) => error.report(),
    }
}

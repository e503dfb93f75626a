//! `plumb health`: which services answer.

use plumb_client::{Code, SERVICES};
use serde_json::json;

use super::Outcome;
use super::args::Global;
use super::output::{print, print_json, table};

pub(crate) async fn run(global: &Global) -> anyhow::Result<Outcome> {
    let client = global.connect().await?;
    let mut rows = Vec::new();
    for service in [""].into_iter().chain(SERVICES) {
        let status = match client.health(service).await {
            Ok(status) => status.as_str_name(),
            // A server may be built without a service.
            Err(error) if error.code() == Code::NotFound => "SERVICE_UNKNOWN",
            Err(error) => return Err(error.into()),
        };
        rows.push([if service.is_empty() { "(server)" } else { service }, status].map(str::to_owned));
    }
    // The server as a whole decides: one that serves only preference models rightly says that it does not generate.
    let healthy = rows.first().is_some_and(|[_, status]| status == "SERVING");
    if global.json {
        for [service, status] in &rows {
            print_json(&json!({"service": service, "status": status}))?;
        }
    } else {
        print(table(["service", "status"], rows))?;
    }
    Ok(if healthy { Outcome::Done } else { Outcome::SomeFailed })
}

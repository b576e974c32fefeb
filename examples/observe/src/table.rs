//! The table of open connections, as text and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};
use tower_tcp::Handle;

pub(crate) fn text(server: &Handle) -> String {
    let mut table = format!(
        "{:>8} {:<12} {:>10} {:>10} {:>12} {:>12} {:>14}  client\n",
        "id", "phase", "seconds", "requests", "read", "written", "unacknowledged"
    );
    for live in server.connections() {
        // `None` if the socket is already closed, or if the system does not report the number.
        let unacknowledged = live.unacknowledged().map(|bytes| bytes.to_string());
        let written = writeln!(
            table,
            "{:>8} {:<12} {:>10.1} {:>10} {:>12} {:>12} {:>14}  {}",
            live.id(),
            live.phase().as_str(),
            live.age().as_secs_f64(),
            live.requests(),
            live.bytes_read(),
            live.bytes_written(),
            unacknowledged.as_deref().unwrap_or("-"),
            live.client_addr(),
        );
        written.expect("a string takes everything");
    }
    table
}

pub(crate) fn json(server: &Handle) -> String {
    let connections = server.connections().map(|live| {
        json!({
            "id": live.id().get(),
            "phase": live.phase().as_str(),
            "seconds": live.age().as_secs_f64(),
            "requests": live.requests(),
            "read": live.bytes_read(),
            "written": live.bytes_written(),
            "unacknowledged": live.unacknowledged(),
            "client": live.client_addr().to_string(),
        })
    });
    format!("{}\n", Value::from_iter(connections))
}

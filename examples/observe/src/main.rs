//! An echo server with everything that its operators need: metrics, spans, a list of connections,
//! and actions on the running server.
//!
//! ```sh
//! cd examples/observe
//! cargo run
//! printf 'hi\n' | nc -N 127.0.0.1 7000
//! curl http://127.0.0.1:7001/                     # lists the pages and actions
//! watch curl -s http://127.0.0.1:7001/connections
//! curl -X POST http://127.0.0.1:7001/limit/100
//! curl -X POST http://127.0.0.1:7001/replace      # by the version that is installed now
//! ```
//!
//! | file | content |
//! | --- | --- |
//! | `admin.rs` | the pages and their paths |
//! | `table.rs` | the list of connections |
//! | `actions.rs` | pause, limit, drain, close, ban, reload, replace |
//! | `telemetry.rs` | metrics in Prometheus' format, spans in OpenTelemetry's |
//! | `main.rs` | the options, and the three servers |
//!
//! The admin pages have a server of their own, and so has the agent check for HAProxy. So both
//! answer while the echo server is paused, at its limit or draining, and end when it has ended. For
//! HAProxy:
//!
//! ```text
//! backend lines
//!     option httpchk GET /live
//!     server a 127.0.0.1:7000 check port 7001 agent-check agent-port 7002 weight 100
//! ```
//!
//! `--deny FILE` reads networks that may not connect from a file, one per line. `/reload` reads the
//! file again. Spans go to standard output; `--sample 0.01` exports the spans of one connection in
//! a hundred. In a browser, the list of connections reloads by itself.
//!
//! # The admin address must not be public
//!
//! There is no password: whoever reaches the address can shut the server down, and sees the
//! addresses of all clients. By default, the address is on loopback, where every user of the
//! machine can reach it. To keep other users out, use a Unix socket in a folder of mode 0700:
//! `--admin unix:/run/observe/admin`. From elsewhere, reach the socket through `ssh -L`. For
//! Prometheus or probes on other machines, add a server that serves only `/metrics`, `/live` and
//! `/ready`.
//!
//! A web page in an operator's browser cannot call the actions, because every action request with
//! an `Origin` header is refused. Bans do not apply to the admin address, so that operators cannot
//! lock themselves out.

mod actions;
mod admin;
mod table;
mod telemetry;

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::{AccessList, AddressFilter, Bans};
use tower_tcp::frame::Lines;
use tower_tcp::health::{AgentCheck, HealthChecks};
use tower_tcp::http::Http;
use tower_tcp::observe::{ConnectionTraceLayer, RequestMetricsLayer, RequestTraceLayer};
use tower_tcp::{BoxError, Pipeline, Server, signal};

use actions::Actions;
use admin::Admin;

/// The time that the admin pages have for their last answers after the echo server has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// An echo server with admin pages.
#[derive(Parser)]
struct Args {
    /// Address to listen on for lines: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: Vec<String>,

    /// Address of the admin pages, such as `unix:/path`. It must not be public, because there is no
    /// password.
    #[arg(long, default_value = "127.0.0.1:7001")]
    admin: String,

    /// Address of the agent check for HAProxy.
    #[arg(long, default_value = "127.0.0.1:7002")]
    agent: String,

    /// File with the networks that may not connect, such as `203.0.113.0/24`, one per line.
    #[arg(long)]
    deny: Option<PathBuf>,

    /// Fraction of the connections whose spans are exported, from 0 to 1.
    #[arg(long, default_value_t = 1.0)]
    sample: f64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let spans = telemetry::export_spans("observe", args.sample);
    let metrics = telemetry::record_metrics()?;

    let bans = Bans::new();
    let denied = AccessList::default();
    if let Some(file) = &args.deny {
        denied.replace(actions::load(file)?);
    }
    let server = Server::builder()
        .name("observe")
        .listen_all(args.listen)
        .address_filter(bans.clone())
        .address_filter(AddressFilter::from(denied.clone()))
        .bind()
        .await?;
    let admin = Server::builder()
        .name("admin")
        .listen(args.admin)
        .shutdown_deadline(LAST_ANSWERS)
        .bind()
        .await?;
    let agent = Server::builder().name("agent").listen(args.agent);
    let agent = agent.bind().await?;
    let handle = server.handle();
    signal::install(&handle)?;
    let pages = Admin {
        checks: HealthChecks::new(handle.clone()),
        metrics,
        actions: Actions {
            server: handle.clone(),
            admin: admin.handle(),
            agent: agent.handle(),
            bans,
            denied,
            deny: args.deny,
        },
    };
    for address in handle.local_addrs() {
        println!("listening on {address}");
    }
    for address in admin.handle().local_addrs() {
        println!("admin pages on {address}");
    }
    for address in agent.handle().local_addrs() {
        println!("agent check on {address}");
    }

    let echo = ServiceBuilder::new()
        .layer(RequestTraceLayer::new())
        .layer(RequestMetricsLayer::with_attributes([(
            "server.name",
            "observe",
        )]))
        .service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(Pipeline::new(Lines::default).service(echo));
    let pages = Http::new(service_fn(move |request| pages.clone().answer(request)));
    let ended = || {
        let handle = handle.clone();
        async move { _ = handle.closed().await }
    };
    let admin = admin.serve(pages).with_graceful_shutdown(ended());
    let agent = agent.serve(AgentCheck::new(handle.clone()));
    let agent = agent.with_graceful_shutdown(ended());
    let (report, ..) = tokio::try_join!(server.serve(stack), admin, agent)?;
    spans.shutdown()?;
    println!("{report}");
    Ok(())
}

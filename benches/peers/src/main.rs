//! Compares the crate's examples with servers that one would write instead, under the same load.
//! The tables of `benches/README.md` come from here.
//!
//! ```sh
//! cargo run --release --package peers -- all
//! cargo run --release --package peers -- lines --rounds 9
//! ```
//!
//! The server has one processor to itself, the load another. Every server runs once a round, so a
//! drift of the machine affects all of them alike. Each figure is compared with that of the first
//! server in the same round, and the median over the rounds is printed. To add a table, add a file
//! in `tables/`; to add a server, add one in `servers/`.
//!
//! | file | content |
//! | --- | --- |
//! | `servers/` | the servers that the crate is compared with, each a program |
//! | `server.rs` | builds and starts servers, and reads what they use |
//! | `load.rs` | sends requests over some connections, and takes their times |
//! | `bench.rs` | rounds, medians, processors |
//! | `table.rs` | prints figures as Markdown |
//! | `tables/` | the comparisons, a file for each table |

mod bench;
mod load;
mod server;
mod table;
mod tables;

use clap::{Parser, Subcommand};

use bench::{Bench, Effort};

/// Compares tower-tcp with what one would write instead, and prints Markdown tables.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    table: Table,

    #[command(flatten)]
    effort: Effort,
}

#[derive(Clone, Copy, Subcommand)]
enum Table {
    /// All tables, one after the other.
    All,
    /// Requests a second and the cost of each, with 1, 16 and 128 ahead of the answers.
    Lines,
    /// The same for each way in which a pipeline runs its requests.
    Dispatch,
    /// The same for each layer around a service, and in instructions.
    Layers,
    /// A new connection for each request.
    Churn,
    /// Memory of connections at rest: lines and HTTP/1.1, each also with TLS, HTTP/2, WebSockets,
    /// events.
    Rest,
    /// Memory of connections that stall within a line, or do not read.
    Memory,
    /// The delay that flooding connections cause for others.
    Fairness,
    /// The `redis` example beside redis.
    Redis,
    /// One publisher and many subscribers, beside redis, NATS and mosquitto.
    Fanout,
    /// TLS that is terminated and forwarded, beside nginx and haproxy.
    Tls,
    /// An axum app, beside `axum::serve` and axum-server.
    Http,
}

impl Table {
    const EACH: [Self; 11] = [
        Self::Lines,
        Self::Dispatch,
        Self::Layers,
        Self::Churn,
        Self::Rest,
        Self::Memory,
        Self::Fairness,
        Self::Redis,
        Self::Fanout,
        Self::Tls,
        Self::Http,
    ];

    async fn print(self, bench: &Bench) -> anyhow::Result<()> {
        match self {
            Self::All => {
                for table in Self::EACH {
                    Box::pin(table.print(bench)).await?;
                }
                Ok(())
            }
            Self::Lines => tables::lines::print(bench).await,
            Self::Dispatch => tables::dispatch::print(bench).await,
            Self::Layers => tables::layers::print(bench).await,
            Self::Churn => tables::churn::print(bench).await,
            Self::Rest => tables::rest::print(bench).await,
            Self::Memory => tables::memory::print(bench).await,
            Self::Fairness => tables::fairness::print(bench).await,
            Self::Redis => tables::redis::print(bench).await,
            Self::Fanout => tables::fanout::print(bench).await,
            Self::Tls => tables::tls::print(bench).await,
            Self::Http => tables::http::print(bench).await,
        }
    }
}

/// The load has one thread, on the processor that it is pinned to.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.table.print(&Bench::new(args.effort)?).await
}

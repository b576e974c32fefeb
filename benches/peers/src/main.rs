//! What the README says about speed: the crate's examples beside servers that one would write instead, under the same load.
//!
//! ```sh
//! cargo run --release --package peers -- all
//! cargo run --release --package peers -- lines --rounds 9
//! ```
//!
//! The server has a processor to itself, the load another. Each round runs every server once, so that a drift of the machine hits all alike, and
//! what counts is the ratio to the first server in the same round; of the rounds' figures the median is printed. To add a table, add a file in `tables/`,
//! to add a server, one in `servers/`.
//!
//! | file | what it is |
//! | --- | --- |
//! | `servers/` | the servers beside which the crate stands, each a program |
//! | `server.rs` | builds and starts them, and asks what they use |
//! | `load.rs` | requests over some connections, and how long they took |
//! | `bench.rs` | rounds, medians, processors |
//! | `table.rs` | figures as markdown |
//! | `tables/` | what is compared, a file for each table |

mod bench;
mod load;
mod server;
mod table;
mod tables;

use clap::{Parser, Subcommand};

use bench::{Bench, Effort};

/// Compares tower-tcp with what one would write instead, and prints tables in markdown.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    table: Table,

    #[command(flatten)]
    effort: Effort,
}

#[derive(Clone, Copy, Subcommand)]
enum Table {
    /// All of them, one after the other.
    All,
    /// Requests a second and what each costs, with 1, 16 and 128 ahead of the answers.
    Lines,
    /// The same for each way in which a pipeline runs its requests.
    Dispatch,
    /// The same for each layer around a service, and in instructions.
    Layers,
    /// A connection for each request.
    Churn,
    /// Memory of connections at rest.
    Idle,
    /// Memory of connections that stall in a line, or do not read.
    Memory,
    /// What others feel of connections that never stop.
    Fairness,
    /// The `redis` example beside redis.
    Redis,
    /// TLS that is ended and handed on, beside nginx and haproxy.
    Tls,
    /// An app of axum, beside `axum::serve` and axum-server.
    Http,
}

impl Table {
    const EACH: [Self; 10] = [
        Self::Lines,
        Self::Dispatch,
        Self::Layers,
        Self::Churn,
        Self::Idle,
        Self::Memory,
        Self::Fairness,
        Self::Redis,
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
            Self::Idle => tables::idle::print(bench).await,
            Self::Memory => tables::memory::print(bench).await,
            Self::Fairness => tables::fairness::print(bench).await,
            Self::Redis => tables::redis::print(bench).await,
            Self::Tls => tables::tls::print(bench).await,
            Self::Http => tables::http::print(bench).await,
        }
    }
}

/// The load has one thread, on the processor it is pinned to.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.table.print(&Bench::new(args.effort)?).await
}

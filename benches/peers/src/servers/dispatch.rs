//! Sends lines back with this crate, in one of three ways of dispatch.

use std::convert::Infallible;

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::{BoxError, Pipeline, Server};

/// The most requests of a connection that may run at the same time.
const CALLS: usize = 64;

#[derive(Parser)]
struct Args {
    way: Way,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    OneAtATime,
    InFlight,
    Multiplexed,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let Args { way } = Args::parse();
    let server = Server::bind("127.0.0.1:0").await?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default).service(echo);
    match way {
        Way::OneAtATime => server.serve(pipeline).await,
        Way::InFlight => server.serve(pipeline.in_flight(CALLS)).await,
        Way::Multiplexed => server.serve(pipeline.multiplexed(CALLS)).await,
    }?;
    Ok(())
}

//! Gives one session to all connections.

use std::convert::Infallible;

use bytes::Bytes;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Session, SessionService};

struct Counter(u64);

impl Session<Bytes> for Counter {
    type Reply = Bytes;
    type Error = Infallible;

    async fn call(&mut self, _line: Bytes) -> Result<Bytes, Infallible> {
        self.0 += 1;
        Ok(self.0.to_string().into())
    }
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let pipeline = Pipeline::new(Lines::default).service(SessionService::new(Counter(0)));
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

//! Makes a session of requests where messages come, too.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Peer;
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
    let make = service_fn(|_: Peer<Bytes, &'static str>| async move {
        Ok::<_, Infallible>(SessionService::new(Counter(0)))
    });
    let pipeline = Pipeline::new(Lines::default).make_event_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

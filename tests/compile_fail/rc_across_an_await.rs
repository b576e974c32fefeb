//! Holds an `Rc` while it waits.

use std::convert::Infallible;
use std::rc::Rc;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move {
        let line = Rc::new(line);
        tokio::task::yield_now().await;
        Ok::<_, Infallible>(Bytes::clone(&line))
    });
    let pipeline = Pipeline::new(Lines::default).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

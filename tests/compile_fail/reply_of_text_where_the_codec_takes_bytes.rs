//! Answers with a `String`, while `Lines` encodes `Bytes`.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let upper = service_fn(|line: Bytes| async move {
        Ok::<_, Infallible>(String::from_utf8_lossy(&line).to_uppercase())
    });
    let pipeline = Pipeline::new(Lines::default).service(upper);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

//! Fails with a type that is no `std::error::Error`.

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[derive(Debug)]
struct Refused;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let refuse = service_fn(|line: Bytes| async move {
        if line.is_empty() {
            Err(Refused)
        } else {
            Ok(line)
        }
    });
    let pipeline = Pipeline::new(Lines::default).service(refuse);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}

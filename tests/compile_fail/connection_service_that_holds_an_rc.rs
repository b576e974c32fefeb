//! Spawns a server whose connection service holds an `Rc` across an await.

use std::rc::Rc;

use tokio::io::AsyncWriteExt;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Connection;
use tower_tcp::Server;
use tower_tcp::bind::Socket;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let raw = service_fn(|mut conn: Connection<Socket>| async move {
        let hello = Rc::new("hello");
        conn.write_all(hello.as_bytes()).await?;
        Ok::<_, BoxError>(())
    });
    let _serving = tokio::spawn(Server::bind("127.0.0.1:7000").await?.serve(raw));
    Ok(())
}

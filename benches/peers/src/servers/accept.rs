//! The part common to all servers written by hand: they accept, and serve each connection in a
//! task.

use std::io;

use tokio::net::{TcpListener, TcpStream};

/// Serves connections on a free port, which the first line of the output names.
pub(crate) async fn serve<F>(connection: impl Fn(TcpStream) -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(connection(stream));
    }
}

//! The memory of connections that make the server hold as much as they can.

use std::io;
use std::time::Duration;

use anyhow::Result;
use futures_util::future::try_join_all;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::bench::Bench;
use crate::load::line;
use crate::server::{Running, Server};
use crate::table::{self, Figure, Table};

const CONNECTIONS: usize = 64;

/// The longest line that is read, its end included: the default of the `echo` example and of
/// `Lines`.
const LONGEST: usize = 64 * 1024;

/// After this long without progress the server reads no more.
const STALL: Duration = Duration::from_millis(500);

/// The size of the kernel's buffer for a client. It is small, so the server soon has to buffer.
const SOCKET_BUFFER: u32 = 16 * 1024;

const FIGURES: [Figure; 1] = [Figure::new("bytes/connection").compared()];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let servers = [
        Server::own("tuned")?,
        Server::example("echo")?.named("**tower-tcp**"),
    ];
    table::head(
        bench,
        "Connections that hold on",
        &format!(
            "Growth of the server's resident memory by {CONNECTIONS} connections that send a \
             line of {LONGEST} bytes without its end, or that send lines of 1024 bytes until the \
             server reads no more, and read nothing."
        ),
    )?;
    let stalls = bench.rounds(&servers, async |server| grown(server, stalls).await);
    let stalls = stalls.await?;
    let unread = bench.rounds(&servers, async |server| grown(server, unread).await);
    let unread = unread.await?;
    let mut table = Table::new("connections", FIGURES);
    table.rows("stall in a line", &servers, &stalls);
    table.rows("do not read", &servers, &unread);
    table.print();
    Ok(())
}

/// Returns the growth of the server's memory per connection, in bytes.
async fn grown(
    server: &Running,
    open: impl AsyncFn(TcpStream) -> io::Result<TcpStream>,
) -> Result<[f64; 1]> {
    let before = server.resident()?;
    let connections = (0..CONNECTIONS).map(|_| async { open(connect(server).await?).await });
    let open = try_join_all(connections).await?;
    sleep(STALL).await;
    let grown = server.resident()?.saturating_sub(before);
    Ok([grown as f64 / open.len() as f64])
}

/// Sends a line without its end.
async fn stalls(mut stream: TcpStream) -> io::Result<TcpStream> {
    stream.write_all(&line(LONGEST)[..LONGEST - 1]).await?;
    Ok(stream)
}

/// Sends lines and reads no answers.
async fn unread(mut stream: TcpStream) -> io::Result<TcpStream> {
    let lines = line(1024).repeat(64);
    while let Ok(written) = timeout(STALL, stream.write(&lines)).await {
        written?;
    }
    Ok(stream)
}

async fn connect(server: &Running) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.connect(server.address()).await
}

//! The app. It would also run under `axum::serve`, except for the handlers that take
//! `ConnectionInfo`.

use std::convert::Infallible;
use std::future::ready;
use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::rejection::ExtensionRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{ConnectInfo, DefaultBodyLimit};
use axum::response::Response;
use axum::response::sse::{Event, Sse};
use axum::routing::{any, get, post};
use axum::{Extension, Json, Router};
use futures_util::{SinkExt, Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tower_http::trace::TraceLayer;
use tower_tcp::ConnectionInfo;
use tower_tcp::tls::TlsInfo;

/// The largest request body, in bytes. An HTTP/2 connection may have 200 concurrent requests
/// (hyper's default), each with a body in memory: 400 MiB with axum's default of 2 MiB.
const LARGEST_BODY: usize = 16 * 1024;

/// The largest WebSocket message, in bytes. A message is buffered until it is complete. The default
/// is 64 MiB.
const LARGEST_MESSAGE: usize = 64 * 1024;

/// The size of a WebSocket's read buffer, in bytes. An idle WebSocket keeps its buffer. The default
/// is 128 KiB.
const READ_BUFFER: usize = 4 * 1024;

/// The maximum wait for a peer's answer to the close frame of a WebSocket.
const LAST_WORD: Duration = Duration::from_secs(1);

pub(crate) fn app() -> Router {
    Router::new()
        .route("/", get(|| ready("hello\n")))
        .route("/sum", post(sum))
        .route("/whoami", get(whoami))
        .route("/slow", get(slow))
        .route("/ticks", get(ticks))
        .route("/echo", any(echo))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(TraceLayer::new_for_http())
}

#[derive(Deserialize)]
struct Operands {
    a: i64,
    b: i64,
}

#[derive(Serialize)]
struct Sum {
    sum: i64,
}

async fn sum(Json(Operands { a, b }): Json<Operands>) -> Json<Sum> {
    let sum = a.saturating_add(b);
    Json(Sum { sum })
}

#[derive(Serialize)]
struct Whoami {
    connection: u64,
    address: Option<SocketAddr>,
    tls: Option<&'static str>,
    protocol: Option<String>,
}

/// Returns what the server knows about the connection of the request.
async fn whoami(
    Extension(info): Extension<ConnectionInfo>,
    address: Result<ConnectInfo<SocketAddr>, ExtensionRejection>,
) -> Json<Whoami> {
    let tls = info.get::<TlsInfo>();
    let protocol = tls.and_then(TlsInfo::alpn);
    Json(Whoami {
        connection: info.id().get(),
        address: address.ok().map(|ConnectInfo(address)| address),
        tls: tls.map(TlsInfo::version),
        protocol: protocol.map(|name| String::from_utf8_lossy(name).into_owned()),
    })
}

/// Answers after a second, to show that a shutdown waits for the answer.
async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(1)).await;
    "slow\n"
}

/// Sends an event every second until the server shuts down.
async fn ticks(
    Extension(info): Extension<ConnectionInfo>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let second = tokio::time::interval(Duration::from_secs(1));
    let ticks = stream::unfold((0_u64, second), |(n, mut second)| async move {
        second.tick().await;
        let event = Event::default().event("tick").data(n.to_string());
        Some((Ok(event), (n + 1, second)))
    });
    Sse::new(ticks.take_until(info.draining()))
}

/// Sends messages back until the peer leaves or the server shuts down.
async fn echo(Extension(info): Extension<ConnectionInfo>, upgrade: WebSocketUpgrade) -> Response {
    let upgrade = upgrade
        .max_message_size(LARGEST_MESSAGE)
        .max_frame_size(LARGEST_MESSAGE)
        .read_buffer_size(READ_BUFFER);
    upgrade.on_upgrade(|mut socket: WebSocket| async move {
        let mut draining = std::pin::pin!(info.draining());
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = &mut draining => break leave(socket, None).await,
            };
            match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    if socket.send(message).await.is_err() {
                        break;
                    }
                }
                // The next read sends the answer to a ping.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                // The next read would also send the answer to a close. But to a slow peer that has
                // half-closed, it would send only a part of the answer.
                Some(Ok(Message::Close(_))) => {
                    _ = socket.flush().await;
                    break;
                }
                Some(Err(err)) if err.to_string().starts_with("Space limit exceeded") => {
                    let too_large = CloseFrame {
                        code: close_code::SIZE,
                        reason: "".into(),
                    };
                    break leave(socket, Some(too_large)).await;
                }
                Some(Err(_)) | None => break,
            }
        }
    })
}

/// Sends a close frame, and reads on until the peer has answered.
async fn leave(mut socket: WebSocket, frame: Option<CloseFrame>) {
    // The peer may be gone already. The connection ends either way.
    _ = socket.send(Message::Close(frame)).await;
    let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
    _ = tokio::time::timeout(LAST_WORD, answered).await;
}

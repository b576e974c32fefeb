#!/usr/bin/env bash
# axum: a WebSocket handler that leaves its loop when it receives `Message::Close` sends no Close
# frame back, though the library underneath has prepared one. tungstenite queues the answer as it
# returns the message, and sends it with the next read, write or flush; dropping the socket does
# none of them. So a client that closes by the rules of RFC 6455 sees an abnormal end (1006).
# A handler that reads once more, until it gets `None`, answers.
#
# Seen with axum 0.8.9, tokio-tungstenite 0.29.0, tokio 1.54.1.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
axum = { version = "=0.8.9", features = ["ws"] }
futures-util = { version = "0.3.31", features = ["sink"] }
tokio = { version = "=1.54.1", features = ["full"] }
tokio-tungstenite = "=0.29.0"
TOML

cat >src/main.rs <<'RUST'
use axum::Router;
use axum::extract::ws::{Message as Received, WebSocket, WebSocketUpgrade};
use axum::routing::any;
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::{Error, Message};

async fn echo(socket: &mut WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if let Received::Close(_) = message {
            break;
        }
        if socket.send(message).await.is_err() {
            break;
        }
    }
}

async fn leaves(mut socket: WebSocket) {
    echo(&mut socket).await;
}

async fn reads_on(mut socket: WebSocket) {
    echo(&mut socket).await;
    while let Some(Ok(_)) = socket.recv().await {}
}

/// Sends a message and Close, and returns all that the server sends.
async fn close(url: String) -> Vec<Result<Message, Error>> {
    let (mut client, _) = tokio_tungstenite::connect_async(url).await.expect("it connects");
    client.send(Message::text("hello")).await.expect("it is open");
    let echoed = client.next().await;
    assert!(matches!(echoed, Some(Ok(Message::Text(_)))), "{echoed:?}");
    client.send(Message::Close(None)).await.expect("it is open");
    client.collect().await
}

#[tokio::main]
async fn main() {
    let app = Router::new()
        .route("/leaves", any(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(leaves) }))
        .route("/reads_on", any(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(reads_on) }));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, app).await });

    let left = close(format!("ws://{addr}/leaves")).await;
    println!("the handler leaves: {left:?}");
    assert!(matches!(left[..], [Err(Error::Protocol(_))]), "it is answered now");

    let read_on = close(format!("ws://{addr}/reads_on")).await;
    println!("the handler reads on: {read_on:?}");
    assert!(matches!(read_on[..], [Ok(Message::Close(_))]));
}
RUST

cargo run --quiet

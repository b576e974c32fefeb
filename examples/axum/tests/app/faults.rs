//! Tests the app under every fault of a connection.

use std::time::Duration;

use axum::http::HeaderValue;
use axum::http::header::DATE;
use axum::response::Response;
use tower::util::MapResponseLayer;
use tower_tcp::ConnectionService;
use tower_tcp::http::Http;
use tower_tcp::testkit::faults::{self, Faulty};

use crate::app::app;

/// Serves the app with a fixed `Date` header, because hyper would add a different one in each run.
fn dated() -> impl ConnectionService<Faulty> {
    Http::new(app().layer(MapResponseLayer::new(|mut response: Response| {
        let headers = response.headers_mut();
        headers.insert(DATE, HeaderValue::from_static("today"));
        response
    })))
}

#[tokio::test(start_paused = true)]
async fn every_fault_leaves_whole_responses() {
    let input = "GET / HTTP/1.1\r\nhost: a\r\n\r\n\
        POST /sum HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\n\r\n\
        7\r\n{\"a\": 2\r\n9\r\n, \"b\": 3}\r\n0\r\n\r\n\
        HEAD / HTTP/1.1\r\nhost: a\r\n\r\n\
        GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n\
        GET /slow HTTP/1.1\r\nhost: a\r\n\r\n";
    let text = "content-type: text/plain; charset=utf-8\r\ndate: today\r\n";
    let output = format!(
        "HTTP/1.1 200 OK\r\n{text}content-length: 6\r\n\r\nhello\n\
        HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ndate: today\r\n\
        content-length: 9\r\n\r\n{{\"sum\":5}}\
        HTTP/1.1 200 OK\r\n{text}content-length: 6\r\n\r\n\
        HTTP/1.1 404 Not Found\r\ndate: today\r\ncontent-length: 0\r\n\r\n\
        HTTP/1.1 200 OK\r\n{text}content-length: 5\r\n\r\nslow\n"
    );

    // The reply to half a body.
    let half = |close, why: &str| {
        let why = format!("Failed to buffer the request body: {why}");
        let length = why.len();
        format!("HTTP/1.1 400 Bad Request\r\n{text}content-length: {length}\r\n{close}\r\n{why}")
    };
    let silent = "no byte of the request body arrived within 30s";
    let check = faults::check(dated, input, output)
        .farewell(half("connection: close\r\n", silent))
        .farewell(half("", "the request body could not be read"));
    check.places(20).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn every_fault_leaves_whole_messages_of_a_websocket() {
    let input = [
        &b"GET /echo HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"[..],
        b"\x81\x85\0\0\0\0hello",    // a text
        b"\x89\x81\0\0\0\0x",        // a ping
        b"\x82\x82\0\0\0\0\0\x01",   // a binary message
        b"\x88\x82\0\0\0\0\x03\xe8", // a close
    ];
    let output = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\
        date: today\r\n\r\n\
        \x81\x05hello\x8a\x01x\x82\x02\0\x01\x88\x02\x03\xe8";

    // A WebSocket may be idle for an hour.
    let check = faults::check(dated, input.concat(), output).within(Duration::from_secs(2 * 3600));

    check.places(20).await.unwrap();
}

//! `observe`, `handle`: the cost to look at a server with many open connections. None of it is on
//! the path of a request.

use std::hint::black_box;

use divan::Bencher;
use tokio::io::DuplexStream;
use tower::service_fn;
use tower_tcp::testkit;
use tower_tcp::{BoxError, Connection, Handle, Server};

use crate::support::{measured, runtime};

const CONNECTIONS: [usize; 2] = [100, 10_000];

#[divan::bench(args = CONNECTIONS)]
fn collect_metrics(bencher: Bencher, connections: usize) {
    with_open(connections, |handle| {
        bencher.bench_local(|| measured(|| handle.collect_metrics()));
    });
}

#[divan::bench(args = CONNECTIONS)]
fn table(bencher: Bencher, connections: usize) {
    with_open(connections, |handle| {
        bencher.bench_local(|| {
            measured(|| {
                for live in handle.connections() {
                    black_box((live.id(), live.phase(), live.age(), live.bytes_read()));
                }
            });
        });
    });
}

/// Runs `f` with a server that has this many open connections.
fn with_open(connections: usize, f: impl FnOnce(&Handle)) {
    runtime().block_on(async {
        let (listener, connector) = testkit::memory();
        let server = Server::from_listener(listener);
        let handle = server.handle();
        // No pipeline here. Another pipeline type would slow the compilation of all the other
        // rooms.
        let wait = service_fn(|conn: Connection<DuplexStream>| async move {
            conn.draining().await;
            Ok::<_, BoxError>(())
        });
        tokio::spawn(server.serve(wait));
        let mut clients = Vec::with_capacity(connections);
        for _ in 0..connections {
            clients.push(connector.connect().await.unwrap());
        }
        while handle.live() < connections {
            tokio::task::yield_now().await;
        }
        f(&handle);
    });
}

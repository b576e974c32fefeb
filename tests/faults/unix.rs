//! The same faults on real sockets: each at each byte of a conversation over a Unix socket.

use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::faults::{Fault, Faulty, Plan};
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::{Connection, EndReason, Pipeline, Server};

use super::{FAULTS, INPUT, echo};

/// Serves an echo of lines at a path. The first connection has the faults of the plan.
async fn serve(path: &Path, plan: Plan) -> Served<()> {
    let server = Server::builder().listen(format!("unix:{}", path.display()).as_str());
    let server = server.bind().await.expect("the path is free");
    let plan = Arc::new(Mutex::new(Some(plan)));
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Socket>| {
            let plan = plan.lock().expect("no holder panics").take();
            conn.map_io(|io| Faulty::new(io, plan.unwrap_or_default()))
        })
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    serve_with(server, (), stack)
}

/// Holds the conversation, and returns the replies and the reason for its end.
async fn talk(path: &Path, served: &Served<()>) -> (String, EndReason) {
    let mut client = UnixStream::connect(path).await.expect("it listens");
    let (mut reader, mut writer) = client.split();
    let mut replies = Vec::new();
    let send = async {
        // The server may have closed already.
        drop(writer.write_all(INPUT.as_bytes()).await);
        drop(writer.shutdown().await);
    };
    let read = async { drop(reader.read_to_end(&mut replies).await) };
    tokio::join!(send, read);
    let replies = String::from_utf8(replies).expect("replies are text");
    let end = served.ended().await.expect("the connection ends");
    (replies, end.reason())
}

#[tokio::test(start_paused = true)]
async fn nothing_is_found_in_a_right_server_over_unix_sockets() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("socket");
    let whole = (INPUT.to_owned(), EndReason::PeerClosed);
    let plans = FAULTS.into_iter().flat_map(|fault| {
        let reads = (0..=INPUT.len() as u64).map(move |at| Plan::new().read(at, fault));
        let writes = (0..INPUT.len() as u64).map(move |at| Plan::new().write(at, fault));
        reads.chain(writes).map(move |plan| (fault, plan))
    });
    for (fault, plan) in plans {
        let mut served = serve(&path, plan.clone()).await;

        let faulty = talk(&path, &served).await;
        let next = talk(&path, &served).await;

        if matches!(fault, Fault::Cut | Fault::Delay(_)) {
            assert_eq!(faulty, whole, "{plan}");
        }
        let (replies, reason) = faulty;
        assert!(INPUT.starts_with(&replies), "{plan}: {replies}");
        assert_eq!(
            fault == Fault::Panic,
            reason == EndReason::Panic,
            "{plan}: {reason}"
        );
        assert!(
            fault == Fault::Stall || !reason.is_timeout(),
            "{plan}: {reason}"
        );
        assert_eq!(next, whole, "{plan}");
        let report = served.shutdown().await.expect("it ends in good order");
        assert_eq!(report.aborted, 0, "{plan}");
        assert!(!path.exists(), "{plan}");
    }
}

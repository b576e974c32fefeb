//! An idle connection holds no permit that connections share.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tower::make::Shared;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::PerCall;
use tower_tcp::{BoxError, Pipeline};

use crate::over::{Over, TRANSPORTS};
use crate::support::{Client, Ends};
use crate::{NET, small};

/// Lets a request of one client be shed while that of another client runs. Then checks that a third
/// client is served, and after it the client whose request was shed.
async fn nobody_rests_on_a_permit(over: Over, gate: &Semaphore) {
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(Client::new(over.connect().await));
    }
    let [busy, shed, other] = &mut clients[..] else {
        unreachable!("there are three")
    };
    assert_eq!(busy.ask("runs").await, "runs");
    busy.send("holds\n").await;
    // Requests of `shed` are answered until `holds` runs.
    while shed.ask("asks").await != "service overloaded" {}
    gate.add_permits(1);
    assert_eq!(busy.line().await, "holds");

    assert_eq!(other.ask("asks").await, "asks", "{}", over.served.way());
    assert_eq!(shed.ask("asks").await, "asks", "{}", over.served.way());
}

#[tokio::test]
async fn a_connection_whose_request_was_shed_rests_on_no_permit() {
    let gate = Arc::new(Semaphore::new(0));
    let opens = Arc::clone(&gate);
    let desk = service_fn(move |line: Bytes| {
        let gate = Arc::clone(&opens);
        async move {
            if line == "holds" {
                gate.acquire().await?.forget();
            }
            Ok::<_, BoxError>(line)
        }
    });
    let told = |result: Result<Bytes, BoxError>| {
        Ok::<_, BoxError>(result.unwrap_or_else(|err| err.to_string().into()))
    };
    let stack = ServiceBuilder::new()
        .map_result(told)
        .load_shed()
        .concurrency_limit(1)
        .service(desk);
    let made = Pipeline::new(Lines::default).make_service(Shared::new(PerCall::new(stack.clone())));
    let shared = Pipeline::new(Lines::default).service(stack);

    let checks = async {
        for transport in TRANSPORTS {
            for over in Over::each_way(transport, small, made.clone()).await {
                nobody_rests_on_a_permit(over, &gate).await;
            }
            for over in Over::each_way(transport, small, shared.clone()).await {
                nobody_rests_on_a_permit(over, &gate).await;
            }
        }
    };
    timeout(NET, checks).await.expect("in time");
}

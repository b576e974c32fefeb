//! The check of a server over TLS: faults at each byte of the handshake and of what is encrypted.

use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::faults::{Check, Fault, Faulty, Plan, Promise, check};
use tower_tcp::tls::Tls;
use tower_tcp::{ConnectionService, Pipeline};

use super::certificates::certified;
use super::{FAULTS, INPUT, echo};

/// Checks an echo of lines over TLS, with a hook in front of its pipeline.
fn check_echo<F, S>(stack: F) -> Check<impl FnMut() -> S>
where
    F: Fn(Tls) -> S + 'static,
    S: ConnectionService<Faulty>,
{
    let (server, mut client) = certified();
    // Without resumption, each handshake has as many bytes as the first.
    Arc::make_mut(&mut client).resumption = Resumption::disabled();
    let (tls, connector) = (Tls::from(server), TlsConnector::from(client));
    check(move || stack(tls.clone()), INPUT, INPUT)
        .seeds(0..16)
        .client(move |io| {
            let localhost = "localhost".try_into().expect("a host name");
            connector.connect(localhost, io)
        })
}

fn right(tls: Tls) -> impl ConnectionService<Faulty> {
    ServiceBuilder::new()
        .layer(PreConnectLayer::new(tls))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)))
}

/// The places are those of the test below, thinned out.
#[tokio::test(start_paused = true)]
async fn nothing_is_found_in_a_right_server_over_tls() {
    for fault in FAULTS {
        for at in (0..1500).step_by(97) {
            let plans = [Plan::new().read(at, fault), Plan::new().write(at, fault)];
            for plan in plans {
                check_echo(right).only(plan).await.unwrap();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
#[ignore = "takes a minute"]
async fn nothing_is_found_in_a_right_server_over_tls_at_any_place() {
    let runs = check_echo(right).await.unwrap().runs();

    // The handshake alone has more than a thousand bytes.
    assert!(runs > 5000, "{runs}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_without_a_deadline_is_found() {
    let hangs = |tls| {
        ServiceBuilder::new()
            .layer(PreConnectLayer::new(tls).deadline(Duration::MAX))
            .service(Pipeline::new(Lines::default).service(service_fn(echo)))
    };

    let stalled = Plan::new().read(100, Fault::Stall);
    let broken = check_echo(hangs).only(stalled).await.unwrap_err();

    assert_eq!(broken.promise(), Promise::Ends);
}

//! Requests reach the service, together with what the server knows about their connection.

use std::sync::Arc;

use hyper::{Request, StatusCode, Version};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::limit::ConcurrencyLimitLayer;
use tower::{Layer, ServiceBuilder, service_fn};
use tower_tcp::ConnectionInfo;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::serve;
use tower_tcp::tls::{Tls, TlsInfo};

use crate::certificates::certified;
use crate::support::{Client, Clients, Ends};
use crate::{GET, Reply, answer, connect, get, http, http2, paths, reply, text};

#[tokio::test(start_paused = true)]
async fn requests_of_one_connection_are_answered_and_counted() {
    let served = serve(http());
    let mut client = served.client().await;

    for _ in 0..3 {
        client.send(GET).await;
        let answer = answer(&mut client).await;
        assert_eq!((answer.status(), answer.body.as_str()), ("200", "/"));
    }
    drop(client);

    assert_eq!(served.end().await.requests(), 3);
}

#[tokio::test(start_paused = true)]
async fn requests_sent_ahead_are_answered_in_order() {
    let served = serve(http());
    let mut client = served.client().await;

    let requests = ["/sleep/2", "/sleep/1", "/last"]
        .map(|path| format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"));
    client.send(requests.concat()).await;

    for path in ["/sleep/2", "/sleep/1", "/last"] {
        assert_eq!(answer(&mut client).await.body, path);
    }
}

#[tokio::test(start_paused = true)]
async fn streams_of_one_connection_run_together_and_are_counted() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;

    let slow = sender.send_request(get("/sleep/60"));
    let quick = sender.send_request(get("/quick"));
    let quick = quick.await.expect("an answer");
    assert_eq!(quick.version(), Version::HTTP_2);
    assert_eq!(text(quick).await, "/quick");
    assert_eq!(text(slow.await.expect("an answer")).await, "/sleep/60");
    drop((sender, connection));

    assert_eq!(served.end().await.requests(), 2);
}

async fn whoami(request: Request<RequestBody>) -> Reply {
    let info = request.extensions().get::<ConnectionInfo>();
    let info = info.expect("each request has it");
    let alpn = info.get::<TlsInfo>().and_then(TlsInfo::alpn);
    let alpn = alpn.map_or("none".into(), String::from_utf8_lossy);
    reply(format!(
        "{} {} {alpn}",
        info.peer_addr(),
        request.version() == Version::HTTP_2
    ))
}

#[tokio::test(start_paused = true)]
async fn a_request_knows_its_connection() {
    let served = serve(Http::new(service_fn(whoami)));
    let mut client = served.client().await;
    let (sender, _connection) = http2(connect(&served).await).await;

    client.send(GET).await;

    assert_eq!(answer(&mut client).await.body, "memory:1 false none");
    let response = sender.send_request(get("/")).await.expect("an answer");
    assert_eq!(text(response).await, "memory:2 true none");
}

#[tokio::test(start_paused = true)]
async fn what_alpn_agrees_on_is_spoken_and_known() {
    let (server, client) = certified();
    let mut server = Arc::unwrap_or_clone(server);
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let tls = PreConnectLayer::new(Tls::from(Arc::new(server)));
    let served = serve(tls.layer(Http::new(service_fn(whoami))));
    let connect_tls = async |protocol: &[u8]| {
        let mut config = (*client).clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from("localhost").expect("a name");
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, connect(&served).await).await;
        stream.expect("the handshake is made")
    };

    let (sender, _connection) = http2(connect_tls(b"h2").await).await;
    let mut old = Client::new(connect_tls(b"http/1.1").await);
    old.send(GET).await;

    assert_eq!(answer(&mut old).await.body, "memory:2 false http/1.1");
    let response = sender.send_request(get("/")).await.expect("an answer");
    assert_eq!(text(response).await, "memory:1 true h2");
}

#[tokio::test(start_paused = true)]
async fn a_service_may_be_made_for_each_connection() {
    let make = service_fn(|info: ConnectionInfo| async move {
        let peer = info.peer_addr().to_string();
        let service = service_fn(move |_: Request<RequestBody>| {
            let peer = peer.clone();
            async move { reply(peer) }
        });
        Ok::<_, std::convert::Infallible>(service)
    });
    let served = serve(Http::make_service(make));

    for peer in ["memory:1", "memory:2"] {
        let mut client = served.client().await;
        client.send(GET).await;
        assert_eq!(answer(&mut client).await.body, peer);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_holds_nothing_of_what_connections_share() {
    // One request at a time over all connections.
    let service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .service_fn(paths);
    let served = serve(Http::new(service));
    let mut idle = served.client().await;
    idle.send(GET).await;
    answer(&mut idle).await;
    let mut other = served.client().await;

    other.send(GET).await;

    assert_eq!(answer(&mut other).await.status(), "200");
}

#[tokio::test(start_paused = true)]
async fn hypers_settings_can_be_changed() {
    let http = http().configure(|hyper| {
        hyper.http1().max_headers(1);
    });
    let served = serve(http);
    let mut client = served.client().await;

    client
        .send("GET / HTTP/1.1\r\nhost: a\r\naccept: b\r\n\r\n")
        .await;

    let answer = answer(&mut client).await;
    assert_eq!(
        answer.status(),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE.as_str()
    );
}

#[test]
#[should_panic = "max_buf_size"]
fn a_setting_that_hyper_refuses_panics_where_it_is_made() {
    let _never = http().configure(|hyper| {
        hyper.http1().max_buf_size(1);
    });
}

#[test]
#[should_panic = "MAX_FRAME_SIZE"]
fn a_setting_that_h2_refuses_panics_where_it_is_made() {
    let _never = http().configure(|hyper| {
        hyper.http2().max_frame_size(1);
    });
}

use std::net::Ipv4Addr;

use rcgen::CertifiedKey;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use tokio::io::{DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::{TlsConnector, client};

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::connection::{Address, Probe};
use crate::error::find_cause;

mod agreed;
mod certificates;
mod clients;
mod endings;
mod files;
mod records;
mod refusals;
mod reload;
mod settings;
mod stream;

type Made = CertifiedKey<rcgen::KeyPair>;
type Served<Io> = Result<Connection<TlsStream<Io>>, BoxError>;

fn made(name: &str) -> Made {
    rcgen::generate_simple_self_signed([name.to_owned()]).unwrap()
}

fn server(made: &Made) -> TlsBuilder {
    Tls::builder().certificate(made.cert.pem(), made.signing_key.serialize_pem())
}

fn client(
    server: &Made,
    versions: &[&'static SupportedProtocolVersion],
    own: Option<&Made>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(server.cert.der().clone()).unwrap();
    let ring = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(ring)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
            builder
                .with_client_auth_cert(vec![own.cert.der().clone()], key)
                .unwrap()
        }
    }
}

fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

fn connection<Io>(io: Io) -> Connection<Io> {
    Connection::new(io, Address::Memory(1), Address::Memory(2), Probe::default())
}

/// Runs the hook on the server's end of a connection.
async fn accept<Io>(tls: &Tls, io: Io) -> Served<Io>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tls.clone().call(connection(io)).await
}

async fn shake(
    tls: &Tls,
    config: ClientConfig,
) -> (
    Served<DuplexStream>,
    io::Result<client::TlsStream<DuplexStream>>,
) {
    shake_as(tls, config, "localhost").await
}

/// Performs a handshake with a client that requests this name.
async fn shake_as(
    tls: &Tls,
    config: ClientConfig,
    name: &'static str,
) -> (
    Served<DuplexStream>,
    io::Result<client::TlsStream<DuplexStream>>,
) {
    let (near, far) = duplex(64 * 1024);
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(name).unwrap();
    tokio::join!(accept(tls, near), connector.connect(name, far))
}

/// Connects a client. Returns whether the client resumed a session, or the server's error if the
/// client was refused. Afterwards `config` contains the new session tickets, and all clones of
/// `config` use them.
async fn resumes(tls: &Tls, config: &ClientConfig) -> Result<bool, rustls::Error> {
    let (served, caller) = shake(tls, config.clone()).await;
    let mut conn = match served {
        Ok(conn) => conn,
        Err(err) => return Err(rustls_error::<DuplexStream>(Err(err))),
    };
    // The client reads the tickets along with the first data.
    conn.write_all(b"x").await.unwrap();
    conn.flush().await.unwrap();
    caller.unwrap().read_u8().await.unwrap();
    Ok(info(&conn).is_resumed())
}

fn info(conn: &Connection<TlsStream<DuplexStream>>) -> &TlsInfo {
    conn.info().get().unwrap()
}

/// Returns the cause of a failed handshake, after checking the reason for which the connection
/// ended.
fn failure<Io>(served: Served<Io>) -> io::Error {
    let ended = served.err().unwrap().downcast::<ConnectionEnded>().unwrap();
    assert_eq!(ended.reason(), EndReason::TlsHandshakeFailed);
    let cause = ended.cause.as_deref().unwrap();
    let cause = cause.downcast_ref::<io::Error>().unwrap();
    match find_cause::<rustls::Error>(cause) {
        Some(inner) => io::Error::new(cause.kind(), inner.clone()),
        None => cause.kind().into(),
    }
}

fn rustls_error<Io>(served: Served<Io>) -> rustls::Error {
    let err = failure(served);
    find_cause::<rustls::Error>(&err).unwrap().clone()
}

//! The stream: slow peers, vectored writes, half-closed connections, and streams that are cut off.

use std::task::Waker;

use tokio::io::{ReadBuf, split};
use tokio_test::{assert_pending, assert_ready, task};

use super::*;

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

type Near = Connection<TlsStream<DuplexStream>>;
type Far = client::TlsStream<DuplexStream>;

/// Performs a handshake over a stream that buffers at most `room` bytes in each direction.
async fn shaken(version: &'static SupportedProtocolVersion, room: usize) -> (Near, Far) {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    let (near, far) = duplex(room);
    let connector = TlsConnector::from(Arc::new(client(&me, &[version], None)));
    let (near, far) = tokio::join!(accept(&tls, near), connector.connect(localhost(), far));
    (near.unwrap(), far.unwrap())
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn any_number_of_bytes_passes_both_ways_at_once_over_a_narrow_stream() {
    for version in VERSIONS {
        for room in [300, 4_096, 1 << 20] {
            let (near, far) = shaken(version, room).await;
            let text = text(300_000);
            let (mut near_read, mut near_write) = split(near);
            let (mut far_read, mut far_write) = split(far);
            let send_near = async {
                near_write.write_all(&text).await.unwrap();
                near_write.shutdown().await.unwrap();
            };
            let send_far = async {
                far_write.write_all(&text).await.unwrap();
                far_write.shutdown().await.unwrap();
            };
            let (mut at_near, mut at_far) = (Vec::new(), Vec::new());

            let ((), (), near_end, far_end) = tokio::join!(
                send_near,
                send_far,
                near_read.read_to_end(&mut at_near),
                far_read.read_to_end(&mut at_far),
            );

            assert!(near_end.is_ok() && far_end.is_ok());
            assert!(at_near == text && at_far == text);
        }
    }
}

#[tokio::test]
async fn a_peer_that_does_not_read_lets_64_kib_be_written() {
    for version in VERSIONS {
        let (mut conn, mut far) = shaken(version, 1024).await;
        let text = text(1 << 20);
        let mut taken = 0;

        let mut write = task::spawn(async {
            while taken < text.len() {
                taken += conn.write(&text[taken..]).await.unwrap();
            }
        });

        assert_pending!(write.poll());
        drop(write);
        assert_eq!(taken, 64 * 1024);
        let mut read = vec![0; taken];
        let (flushed, received) = tokio::join!(conn.flush(), far.read_exact(&mut read));
        assert!(flushed.is_ok() && received.is_ok());
        assert!(read == text[..taken]);
    }
}

#[tokio::test]
async fn small_buffers_are_written_as_one_record() {
    for version in VERSIONS {
        let (mut conn, mut far) = shaken(version, 1 << 20).await;
        let large = text(20_000);
        let parts: [&[u8]; 5] = [b"", b"head", b"", b"body", &large];
        let bufs = parts.map(io::IoSlice::new);

        let written = conn.write_vectored(&bufs).await.unwrap();
        let large_first = conn.write_vectored(&[bufs[4], bufs[1]]).await.unwrap();
        let none = conn.write_vectored(&bufs[..1]).await.unwrap();
        conn.flush().await.unwrap();

        assert_eq!((written, large_first, none), (16 * 1024, 20_000, 0));
        let mut read = vec![0; written + large_first];
        far.read_exact(&mut read).await.unwrap();
        let all = parts.concat();
        assert!(read == [&all[..written], &large[..]].concat());
    }
}

#[tokio::test]
async fn a_half_closed_connection_still_sends() {
    for version in VERSIONS {
        let (mut conn, mut far) = shaken(version, 1 << 16).await;
        far.write_all(b"question").await.unwrap();
        far.shutdown().await.unwrap();
        let mut question = Vec::new();
        conn.read_to_end(&mut question).await.unwrap();

        conn.write_all(b"answer").await.unwrap();
        conn.shutdown().await.unwrap();
        conn.shutdown().await.unwrap();

        assert_eq!(question, b"question");
        assert_eq!(conn.read(&mut [0; 8]).await.unwrap(), 0);
        let late = conn.write(b"more").await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::BrokenPipe);
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }
}

#[tokio::test]
async fn data_before_a_bad_record_is_read_before_the_error() {
    for version in VERSIONS {
        let (mut conn, mut far) = shaken(version, 1 << 16).await;
        far.write_all(b"good").await.unwrap();
        far.flush().await.unwrap();
        far.get_mut().0.write_all(&[23, 3, 3, 0, 20]).await.unwrap();
        far.get_mut().0.write_all(&[0; 20]).await.unwrap();
        let mut good = [0; 4];

        conn.read_exact(&mut good).await.unwrap();
        let bad = conn.read(&mut good).await.unwrap_err();
        let again = conn.read(&mut good).await.unwrap_err();
        let write = conn.write(b"more").await.unwrap_err();

        assert_eq!(&good, b"good");
        for err in [bad, again, write] {
            assert_eq!(err.kind(), io::ErrorKind::InvalidData);
            let err = find_cause::<rustls::Error>(&err).unwrap();
            assert_eq!(*err, rustls::Error::DecryptError);
        }
        // The alert was sent without a flush.
        let alert = far.read(&mut good).await.unwrap_err();
        let alert = find_cause::<rustls::Error>(&alert).unwrap();
        assert!(matches!(alert, rustls::Error::AlertReceived(_)));
    }
}

#[tokio::test]
async fn a_stream_cut_off_anywhere_in_a_record_is_truncated() {
    for cut in [0, 1, 4, 5, 20] {
        let (mut conn, mut far) = shaken(&TLS13, 1 << 16).await;
        let record = [&[23, 3, 3, 0, 40][..], &[0; 40]].concat();
        far.get_mut().0.write_all(&record[..cut]).await.unwrap();
        far.get_mut().0.shutdown().await.unwrap();

        let err = conn.read(&mut [0; 8]).await.unwrap_err();
        let again = conn.read(&mut [0; 8]).await.unwrap_err();

        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(again.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn a_stream_inside_of_another_one_is_read() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    let (outer, far) = shaken(&TLS13, 1 << 16).await;
    let connector = TlsConnector::from(Arc::new(client(&me, &[&TLS13], None)));

    let (inner, far) = tokio::join!(accept(&tls, outer), connector.connect(localhost(), far));
    let (mut inner, mut far) = (inner.unwrap(), far.unwrap());
    let text = text(100_000);
    let mut read = vec![0; text.len()];
    let (sent, received) = tokio::join!(
        async {
            far.write_all(&text).await?;
            far.flush().await
        },
        inner.read_exact(&mut read)
    );

    assert!(sent.is_ok() && received.is_ok());
    assert!(read == text);
}

#[tokio::test]
async fn a_read_with_no_room_reads_nothing() {
    let (mut conn, mut far) = shaken(&TLS13, 1 << 16).await;
    far.write_all(b"text").await.unwrap();
    let mut cx = Context::from_waker(Waker::noop());

    let read = Pin::new(&mut conn).poll_read(&mut cx, &mut ReadBuf::new(&mut []));

    assert_ready!(read).unwrap();
    assert_eq!(conn.read_u8().await.unwrap(), b't');
}

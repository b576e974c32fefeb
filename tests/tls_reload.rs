//! Certificates, revocation lists and ticket keys can be changed while clients of other projects
//! connect.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use openssl::Openssl;
use process::{Example, having, installed, soon};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

#[path = "support/openssl.rs"]
mod openssl;
#[path = "support/process.rs"]
mod process;

/// A directory with the files of a server and its clients.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        path.to_str().expect("it is text").to_owned()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).expect("a file");
    }

    /// Makes a certificate for a name, and writes it and its key. Returns it in PEM.
    fn certificate(&self, file: &str, name: &str) -> String {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("it is signed");
        self.write(file, made.cert.pem());
        self.write(&format!("{file}.key"), made.signing_key.serialize_pem());
        made.cert.pem()
    }

    fn arguments(&self, certificates: &[&str]) -> Vec<String> {
        let of = |file: &&str| {
            let (cert, key) = (self.path(file), self.path(&format!("{file}.key")));
            ["--cert".to_owned(), cert, "--key".to_owned(), key]
        };
        certificates.iter().flat_map(of).collect()
    }
}

async fn start(arguments: &[String]) -> Example {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    Example::start("tls_echo", &arguments).await
}

/// Sends one line by `openssl s_client` and waits for its echo. Returns all that openssl says.
async fn openssl(server: SocketAddr, arguments: &[&str]) -> String {
    let mut client = Openssl::connect(server, arguments);
    // The client may have been refused, and openssl may have exited.
    _ = client.stdin.write_all(b"hello\n").await;
    let mut said = String::new();
    let talk = async {
        loop {
            let mut line = String::new();
            let read = client.stdout.read_line(&mut line).await.expect("text");
            said.push_str(&line);
            // openssl may be in the middle of a line of its own.
            if read == 0 || line.ends_with("hello\n") {
                break;
            }
        }
        drop(client.stdin);
        client.stdout.read_to_string(&mut said).await.expect("text");
        client.stderr.read_to_string(&mut said).await.expect("text");
    };
    soon("the end of openssl", talk).await;
    said.replace('\r', "")
}

/// Returns whether openssl resumed a session.
fn reused(said: &str) -> bool {
    assert!(said.contains("hello\n"), "not served: {said}");
    assert!(
        said.contains("\nReused, TLS") != said.contains("\nNew, TLS"),
        "{said}"
    );
    said.contains("\nReused, TLS")
}

async fn reload(server: &Example, times: usize) {
    server.signal(Signal::HUP);
    let reloaded = server.logged(times, &["reloaded"]).await;
    assert!(
        !reloaded.iter().any(|line| line.contains("not reloaded")),
        "{reloaded:?}"
    );
}

#[tokio::test]
async fn openssl_gets_the_certificate_for_each_of_ten_names() {
    if !installed("openssl") {
        return;
    }
    let files = Files::new();
    let default = files.certificate("default", "default.test");
    let names: Vec<_> = (1..=9).map(|n| format!("n{n}.test")).collect();
    let mut certificates = vec![("default.test".to_owned(), default.clone())];
    for name in &names {
        certificates.push((name.clone(), files.certificate(name, name)));
    }
    let wildcard = files.certificate("wildcard", "*.example.org");
    let all = certificates.iter().skip(1).map(|(name, _)| name.as_str());
    let all: Vec<_> = ["default"]
        .into_iter()
        .chain(all)
        .chain(["wildcard"])
        .collect();
    let arguments = files.arguments(&all);
    let lenient = start(&arguments).await;
    let strict = start(&[arguments, vec!["--strict-sni".to_owned()]].concat()).await;

    certificates.push(("N3.Test".to_owned(), certificates[3].1.clone()));
    certificates.push(("shop.example.org".to_owned(), wildcard));
    for (name, certificate) in &certificates {
        for server in [&lenient, &strict] {
            let said = openssl(server.addr(), &["-servername", name]).await;
            assert!(said.contains(certificate.trim()), "{name}: {said}");
        }
    }
    let others: [(&[_], _); 4] = [
        (&["-servername", "example.org"], "alert number 112"),
        (&["-servername", "a.b.example.org"], "alert number 112"),
        (
            &["-servername", "unknown.test", "-tls1_2"],
            "alert number 112",
        ),
        (&["-noservername"], "alert number 109"),
    ];
    for (arguments, alert) in others {
        let said = openssl(lenient.addr(), arguments).await;
        assert!(said.contains(default.trim()), "{arguments:?}: {said}");
        let said = openssl(strict.addr(), arguments).await;
        assert!(said.contains(alert), "{arguments:?}: {said}");
        assert!(!said.contains("hello"), "{arguments:?}: {said}");
    }
    let log = strict.stop().await.log;
    let refused = having(
        &log,
        &["connection.closed", "\"tls_handshake_failed\"", " DEBUG "],
    );
    assert_eq!(refused.len(), 4, "{log:#?}");
    assert!(
        refused[0].contains("no certificate for the server name example.org"),
        "{refused:#?}"
    );
    assert!(
        refused[3].contains("no server name was requested"),
        "{refused:#?}"
    );
}

#[tokio::test]
async fn no_handshake_fails_during_reloads_and_the_new_certificate_is_served_at_once() {
    if !installed("openssl") {
        return;
    }
    let files = Files::new();
    files.certificate("cert", "localhost");
    let server = start(&files.arguments(&["cert"])).await;
    let done = AtomicBool::new(false);

    let bystander = async {
        let mut served = 0;
        while !done.load(Ordering::Relaxed) {
            let said = openssl(server.addr(), &[]).await;
            assert!(said.contains("hello\n"), "{said}");
            served += 1;
        }
        served
    };
    let reloads = async {
        for times in 1..=10 {
            let new = files.certificate("cert", "localhost");
            reload(&server, times).await;
            let said = openssl(server.addr(), &[]).await;
            assert!(said.contains(new.trim()), "{said}");
        }
        done.store(true, Ordering::Relaxed);
    };
    let (served, ()) = tokio::join!(bystander, reloads);

    assert!(served > 1);
    let log = server.stop().await.log;
    assert!(
        having(&log, &["tls_handshake_failed"]).is_empty(),
        "{log:#?}"
    );
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_named() {
    if !installed("openssl") {
        return;
    }
    let files = Files::new();
    let old = files.certificate("cert", "localhost");
    let server = start(&files.arguments(&["cert"])).await;

    let other = files.certificate("other", "localhost");
    for (broken, why) in [
        (other.as_str(), "does not match the certificate in"),
        ("no certificate", "no certificate in"),
    ] {
        files.write("cert", broken);
        server.signal(Signal::HUP);
        let said = server.logged(1, &["not reloaded: ", why]).await;
        assert!(said[0].contains(&files.path("cert")), "{said:?}");
        let said = openssl(server.addr(), &[]).await;
        assert!(said.contains(old.trim()), "{said}");
    }
}

/// Writes the root certificate of clients, the certificates of a good and a bad client, and a
/// revocation list, which is still empty.
fn clients(files: &Files) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().expect("a key");
    let roots = params.self_signed(&key).expect("it is signed");
    files.write("roots", roots.pem());
    let issuer = Issuer::new(params, key);
    for (serial, name) in [(1_u64, "good"), (2, "bad")] {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &issuer).expect("it is signed");
        files.write(name, cert.pem());
        files.write(&format!("{name}.key"), key.serialize_pem());
    }
    revoke(files, &issuer, &[]);
    issuer
}

fn revoke(files: &Files, issuer: &Issuer<'static, KeyPair>, serials: &[u64]) {
    let revoked = serials.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: date_time_ymd(2024, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(3000, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = params.signed_by(issuer).expect("it is signed");
    files.write("crl", list.pem().expect("PEM"));
}

#[tokio::test]
async fn openssl_does_not_get_in_with_a_revoked_certificate_by_a_session_or_without() {
    if !installed("openssl") {
        return;
    }
    for shared in [false, true] {
        let files = Files::new();
        files.certificate("cert", "localhost");
        let issuer = clients(&files);
        let mut arguments = files.arguments(&["cert"]);
        for (flag, file) in [("--client-roots", "roots"), ("--crl", "crl")] {
            arguments.extend([flag.to_owned(), files.path(file)]);
        }
        if shared {
            files.write("ticket", [7; 80]);
            arguments.extend(["--ticket-key".to_owned(), files.path("ticket")]);
        }
        let server = start(&arguments).await;
        let ask = async |name: &str, version: &str, more: &[&str]| {
            let (cert, key) = (files.path(name), files.path(&format!("{name}.key")));
            let own = ["-cert", &cert, "-key", &key, version];
            openssl(server.addr(), &[&own, more].concat()).await
        };
        for (n, version) in ["-tls1_3", "-tls1_2"].into_iter().enumerate() {
            let [good, bad] = ["good.session", "bad.session"].map(|name| files.path(name));
            assert!(!reused(&ask("good", version, &["-sess_out", &good]).await));
            assert!(!reused(&ask("bad", version, &["-sess_out", &bad]).await));
            let resumed = ask("bad", version, &["-sess_in", &bad, "-sess_out", &bad]).await;
            assert!(reused(&resumed), "before");

            revoke(&files, &issuer, &[2]);
            reload(&server, 2 * n + 1).await;

            for session in [&["-sess_in", &bad], [].as_slice()] {
                let said = ask("bad", version, session).await;
                assert!(!said.contains("hello\n"), "{session:?}: {said}");
                assert!(said.contains("certificate revoked"), "{said}");
            }
            assert!(!reused(&ask("good", version, &["-sess_in", &good]).await));
            revoke(&files, &issuer, &[]);
            reload(&server, 2 * n + 2).await;
        }
        let log = server.stop().await.log;
        let refused = having(
            &log,
            &["connection.closed", "\"tls_handshake_failed\"", " DEBUG "],
        );
        assert_eq!(refused.len(), 4, "{log:#?}");
        assert!(refused[0].contains("Revoked"), "{refused:#?}");
    }
}

#[tokio::test]
async fn two_processes_with_one_ticket_key_resume_openssls_session_until_it_is_rotated_out() {
    if !installed("openssl") {
        return;
    }
    let files = Files::new();
    files.certificate("cert", "localhost");
    let (current, previous) = (files.path("current"), files.path("previous"));
    let keys = ["--ticket-key", &current, "--ticket-key", &previous];
    let mut arguments = files.arguments(&["cert"]);
    arguments.extend(keys.map(str::to_owned));
    files.write("current", [1; 80]);
    files.write("previous", [0; 80]);
    let (here, there) = (start(&arguments).await, start(&arguments).await);
    let rotate = async |key: u8, times: usize| {
        std::fs::rename(Path::new(&current), Path::new(&previous)).expect("it is renamed");
        files.write("current", [key; 80]);
        reload(&here, times).await;
        reload(&there, times).await;
    };

    for (n, version) in ["-tls1_3", "-tls1_2"].into_iter().enumerate() {
        let session = files.path("session");
        let save = [version, "-sess_out", &session];
        let offer = [version, "-sess_in", &session];
        assert!(!reused(&openssl(here.addr(), &save).await));
        assert!(reused(&openssl(there.addr(), &offer).await), "by the other");

        rotate(2 * n as u8 + 2, 2 * n + 1).await;
        assert!(
            reused(&openssl(there.addr(), &offer).await),
            "by the old key"
        );
        rotate(2 * n as u8 + 3, 2 * n + 2).await;
        assert!(!reused(&openssl(there.addr(), &offer).await), "rotated out");
    }
}

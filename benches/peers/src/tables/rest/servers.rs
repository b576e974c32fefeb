//! The servers of each protocol.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::CertifiedKey;

use crate::server::{Server, free_port};
use crate::tables::echoes;

/// More connections than are opened. haproxy wants two files for each.
const MOST: u32 = 8_000;

pub(super) struct Servers {
    dir: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    go: Option<Server>,
    missing: String,
}

impl Servers {
    pub(super) fn new(dir: &Path, made: &CertifiedKey<rcgen::KeyPair>) -> Result<Self> {
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        fs::write(&cert, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        // haproxy reads both from one file, or the key from a file of this name.
        fs::copy(&key, dir.join("cert.pem.key"))?;
        let go = Server::go("http")?;
        let mut missing = String::new();
        let mut miss = |name: &str| missing += &format!(" {name} is not installed.");
        if go.is_none() {
            miss("Go");
        }
        for name in ["nginx", "haproxy"] {
            if Server::installed(name, 0)?.is_none() {
                miss(name);
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            cert,
            key,
            go,
            missing,
        })
    }

    /// Returns a note about the servers that are not installed.
    pub(super) fn missing(&self) -> &str {
        &self.missing
    }

    pub(super) fn lines(&self) -> Result<Vec<Server>> {
        Ok(echoes()?.0)
    }

    pub(super) fn tls_lines(&self) -> Result<Vec<Server>> {
        let raw = Server::own("bytes")?.named("bytes, tokio-rustls");
        let ours = Server::example("tls_echo")?.arg("--cert").arg(&self.cert);
        Ok(vec![
            raw.arg(&self.cert).arg(&self.key),
            ours.arg("--key").arg(&self.key).named("**tower-tcp**"),
        ])
    }

    pub(super) fn http1(&self) -> Result<Vec<Server>> {
        let mut servers = self.axum(&[])?;
        servers.extend(self.go.clone());
        servers.extend(self.nginx("", "")?);
        servers.extend(self.haproxy("")?);
        Ok(servers)
    }

    pub(super) fn https1(&self) -> Result<Vec<Server>> {
        let files = [self.cert.as_path(), self.key.as_path()];
        let mut servers = self.axum(&files)?;
        let go = self.go.clone();
        servers.extend(go.map(|go| files.iter().fold(go, Server::arg)));
        let [cert, key] = files.map(Path::display);
        let nginx = format!("ssl_certificate {cert}; ssl_certificate_key {key};");
        let protocols = "ssl_protocols TLSv1.3;";
        servers.extend(self.nginx("ssl", &format!("{nginx} {protocols}"))?);
        servers.extend(self.haproxy(&format!("ssl crt {cert}"))?);
        Ok(servers)
    }

    pub(super) fn http2(&self) -> Result<Vec<Server>> {
        let mut servers = self.axum(&[])?;
        servers.push(Server::own("http")?.arg("tonic").named("tonic"));
        servers.extend(self.nginx("http2", "")?);
        servers.extend(self.haproxy("proto h2")?);
        Ok(servers)
    }

    pub(super) fn axum(&self, files: &[&Path]) -> Result<Vec<Server>> {
        let http = Server::own("http")?;
        let by = |arg, name| {
            let server = http.clone().arg(arg).named(name);
            files.iter().fold(server, Server::arg)
        };
        Ok(vec![
            by("axum-serve", "axum::serve"),
            by("axum-server-guarded", "axum-server, guarded"),
            by("tower-tcp", "**tower-tcp**"),
        ])
    }

    /// Creates nginx with options of its `listen`, and directives of its server.
    fn nginx(&self, listen: &str, server: &str) -> Result<Option<Server>> {
        let port = free_port()?;
        let config = self.dir.join(format!("nginx-{port}.conf"));
        let dir = self.dir.display();
        let text = format!(
            "daemon off; master_process off; pid {dir}/{port}.pid; error_log {dir}/nginx.log;
             events {{ worker_connections {MOST}; }}
             http {{ access_log off; keepalive_timeout 1h; server {{
                 listen 127.0.0.1:{port} {listen} backlog=1024;
                 {server}
                 location / {{ return 200 \"Hello, world!\"; }}
             }} }}"
        );
        fs::write(&config, text)?;
        let nginx = Server::installed("nginx", port)?;
        Ok(nginx.map(|it| it.arg("-c").arg(config)))
    }

    /// Creates haproxy with options of its `bind`.
    fn haproxy(&self, bind: &str) -> Result<Option<Server>> {
        let port = free_port()?;
        let config = self.dir.join(format!("haproxy-{port}.cfg"));
        let text = format!(
            "global
               nbthread 1
               maxconn {MOST}
             defaults
               mode http
               timeout client 1h
               timeout http-keep-alive 1h
               timeout http-request 1h
             frontend http
               bind 127.0.0.1:{port} {bind}
               http-request return status 200 content-type text/plain string \"Hello, world!\"\n"
        );
        fs::write(&config, text)?;
        let haproxy = Server::installed("haproxy", port)?;
        Ok(haproxy.map(|it| it.arg("-f").arg(config)))
    }
}

//! Builds and starts servers, and reads what they use.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::time::Duration;
use std::{env, fs, io};

use anyhow::{Context, Result, ensure};
use escargot::CargoBuild;
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Far more time than any server needs to start listening.
const START: Duration = Duration::from_secs(10);

const PACKAGE: &str = env!("CARGO_MANIFEST_DIR");

/// `true` in a release build. Servers are built with the profile of this program.
pub(crate) const OPTIMISED: bool = !cfg!(debug_assertions);

/// A program that serves on a free port and prints that port in the first line of its output:
/// `listening on 127.0.0.1:7000`. Programs of other projects are told their port instead.
#[derive(Clone)]
pub(crate) struct Server {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    /// The port, if the program does not print it.
    port: Option<u16>,
}

impl Server {
    /// One of this package's servers, in `servers/`.
    pub(crate) fn own(name: &str) -> Result<Self> {
        let build = package(&Path::new(PACKAGE).join("Cargo.toml")).bin(name);
        Self::built(name, build)
    }

    /// One of the crate's examples.
    pub(crate) fn example(name: &str) -> Result<Self> {
        let build = package(&Path::new(PACKAGE).join("../../Cargo.toml")).example(name);
        Ok(Self::built(name, build)?.arg("--listen").arg("127.0.0.1:0"))
    }

    /// One of the servers written in Go, in `servers/`, if Go is installed.
    pub(crate) fn go(name: &str) -> Result<Option<Self>> {
        let program = env::current_exe()?.with_file_name(format!("{name}-go"));
        let mut build = process::Command::new("go");
        build.args(["build", "-o"]).arg(&program);
        let built = build
            .arg(Path::new(PACKAGE).join(format!("src/servers/{name}.go")))
            .status();
        match built {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            built => ensure!(built?.success(), "the Go servers could not be built"),
        }
        Ok(Some(Self::new("go", program)))
    }

    /// A program of another project, if it is installed. The caller adds the arguments that make it
    /// listen on `port` of 127.0.0.1.
    pub(crate) fn installed(name: &str, port: u16) -> Result<Option<Self>> {
        let asked = process::Command::new(name).arg("--version").output();
        match asked {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            asked => {
                asked.with_context(|| format!("{name} cannot be started"))?;
                Ok(Some(Self {
                    port: Some(port),
                    ..Self::new(name, name)
                }))
            }
        }
    }

    fn built(name: &str, build: CargoBuild) -> Result<Self> {
        eprintln!("building {name}");
        let build = if OPTIMISED { build.release() } else { build };
        let built = build
            .run()
            .with_context(|| format!("{name} could not be built"))?;
        Ok(Self::new(name, built.path()))
    }

    fn new(name: &str, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            program: program.into(),
            args: Vec::new(),
            port: None,
        }
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Sets the name shown in the tables.
    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Starts the program on the processors of this thread.
    pub(crate) fn spawn(&self) -> Result<Spawned> {
        let output = match self.port {
            Some(_) => Stdio::null(),
            None => Stdio::piped(),
        };
        let child = Command::new(&self.program)
            .args(&self.args)
            .env("GOMAXPROCS", "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} cannot be started", self.program.display()))?;
        Ok(Spawned {
            name: self.name.clone(),
            child,
            port: self.port,
        })
    }
}

fn package(manifest: &Path) -> CargoBuild {
    CargoBuild::new().manifest_path(manifest)
}

/// A started server. Dropping it kills the process.
pub(crate) struct Spawned {
    name: String,
    child: Child,
    port: Option<u16>,
}

impl Spawned {
    /// Waits until the server listens.
    pub(crate) async fn listening(mut self) -> Result<Running> {
        let (address, output) = timeout(START, self.address()).await??;
        let pid = self.child.id().context("it ended")?;
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
        Ok(Running {
            name: self.name,
            child: self.child,
            pid,
            address,
            clock,
            _output: output,
        })
    }

    async fn address(&mut self) -> Result<(SocketAddr, Option<Output>)> {
        if let Some(port) = self.port {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            while TcpStream::connect(address).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
            return Ok((address, None));
        }
        let output = self.child.stdout.take().context("its output is piped")?;
        let mut output = BufReader::new(output).lines();
        let line = output.next_line().await?.context("it ended")?;
        let address = line
            .strip_prefix("listening on ")
            .with_context(|| format!("it says {line:?}"))?;
        Ok((address.parse()?, Some(output)))
    }
}

type Output = Lines<BufReader<ChildStdout>>;

/// A listening server. Dropping it kills the process.
pub(crate) struct Running {
    name: String,
    child: Child,
    pid: u32,
    address: SocketAddr,
    clock: ClockId,
    /// Kept open, because the server may print more.
    _output: Option<Output>,
}

impl Running {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the CPU time of the server so far, user and system.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        Ok(self.clock.now()?.into())
    }

    /// Returns the CPU time that the server uses between two future instants.
    pub(crate) async fn cpu_in(&self, span: Range<Instant>) -> Result<Duration> {
        sleep_until(span.start).await;
        let before = self.cpu()?;
        sleep_until(span.end).await;
        Ok(self.cpu()? - before)
    }

    /// Returns the resident memory of the server, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        self.memory("smaps_rollup", "Rss:")
    }

    /// Returns the largest resident memory that the server had so far, in bytes.
    pub(crate) fn peak(&self) -> Result<u64> {
        self.memory("status", "VmHWM:")
    }

    fn memory(&self, file: &str, name: &str) -> Result<u64> {
        let path = format!("/proc/{}/{file}", self.pid);
        let kib = field(Path::new(&path), name)?;
        Ok(1024 * kib.trim_end_matches("kB").trim_end().parse::<u64>()?)
    }

    /// Kills the server and waits until it is gone.
    pub(crate) async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// Returns a free port for a program that has to be told its port. Nothing reserves the port until
/// the program listens.
pub(crate) fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// Returns the value of a field in one of the files of `/proc`.
pub(crate) fn field(file: &Path, name: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut found = text.lines().filter_map(|line| line.strip_prefix(name));
    let value = found
        .next()
        .with_context(|| format!("no {name} in {}", file.display()))?;
    Ok(value.trim().to_owned())
}

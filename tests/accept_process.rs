//! Accept, in a process of its own: out of file descriptors, with system calls that fail, and with
//! all system calls counted.
//!
//! The child process is the `echo` example. `strace` makes system calls fail, or lists them.
//! Without strace those tests are skipped, except where `CI` is set.
#![cfg(target_os = "linux")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// The limit of every wait, far longer than any of them takes.
const NET: Duration = Duration::from_secs(30);

fn echo() -> PathBuf {
    example("echo")
}

fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this runs from a file");
    let example = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("tests are in target/debug/deps")
        .join("examples")
        .join(name);
    assert!(example.exists(), "not built: run `cargo build --examples`");
    example
}

/// A running example.
struct Echo {
    child: Child,
    addr: String,
    log: mpsc::Receiver<String>,
}

/// Starts the command that runs the example. `program` ends with the example's path.
async fn start(program: &mut Command) -> Echo {
    let mut child = program
        .args(["--listen", "127.0.0.1:0"])
        .env("RUST_LOG", "tower_tcp=debug")
        .env("NO_COLOR", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the example starts");
    let stdout = child.stdout.take().expect("it is piped");
    let mut lines = BufReader::new(stdout).lines();
    let first = timeout(NET, lines.next_line()).await;
    let first = first.expect("it listens in time").expect("it is text");
    let first = first.expect("it says where it listens");
    let addr = first.strip_prefix("listening on ").expect("an address");
    let (log, logged) = mpsc::channel(100_000);
    let stderr = child.stderr.take().expect("it is piped");
    tokio::spawn(async move {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if log.send(line).await.is_err() {
                break;
            }
        }
    });
    // Keep reading, so that further output cannot fill the pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Echo {
        child,
        addr: addr.to_owned(),
        log: logged,
    }
}

impl Echo {
    async fn connect(&self) -> BufReader<TcpStream> {
        let stream = timeout(NET, TcpStream::connect(&self.addr)).await;
        BufReader::new(stream.expect("in time").expect("the server listens"))
    }

    /// Waits until `what` is logged.
    async fn says(&mut self, what: &str) {
        let said = async {
            loop {
                let line = self.log.recv().await.expect("the example runs");
                if line.contains(what) {
                    return;
                }
            }
        };
        timeout(NET, said).await.expect("it is said in time");
    }

    /// Returns how many of the unread log lines contain `what`.
    fn logged(&mut self, what: &str) -> usize {
        let mut count = 0;
        while let Ok(line) = self.log.try_recv() {
            count += usize::from(line.contains(what));
        }
        count
    }

    fn pid(&self) -> u32 {
        self.child.id().expect("it was not waited for")
    }

    /// Returns the CPU time of the process so far.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))
            .expect("the example runs");
        // The name, in parentheses, may contain anything. The state and 10 fields come between it
        // and the CPU times.
        let (_, fields) = stat.rsplit_once(')').expect("it has a name");
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || -> u64 {
            let field = fields.next().expect("it has times");
            field.parse().expect("a number of ticks")
        };
        Duration::from_millis((ticks() + ticks()) * 10)
    }

    async fn terminate(&self) {
        let kill = Command::new("kill")
            .args(["-TERM", &self.pid().to_string()])
            .status()
            .await;
        assert!(kill.expect("kill is there").success());
    }
}

async fn ask(client: &mut BufReader<TcpStream>) {
    client.write_all(b"hi\n").await.expect("it is open");
    let mut reply = String::new();
    let read = timeout(NET, client.read_line(&mut reply)).await;
    read.expect("in time").expect("it is open");
    assert_eq!(reply, "hi\n");
}

/// Starts a server with 64 descriptors and 200 clients. Each client sends a line, reports its reply
/// and stays connected.
async fn exhausted() -> (
    Echo,
    Vec<tokio::task::JoinHandle<()>>,
    mpsc::Receiver<usize>,
) {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\""])
        .arg(echo());
    let mut echo = start(&mut shell).await;
    let (served, who_is_served) = mpsc::channel(200);
    let mut clients = Vec::new();
    for n in 0..200 {
        let mut client = echo.connect().await;
        let served = served.clone();
        clients.push(tokio::spawn(async move {
            client.write_all(b"hi\n").await.expect("it is open");
            let mut reply = String::new();
            if client.read_line(&mut reply).await.is_ok_and(|n| n > 0) {
                served.send(n).await.expect("the test runs");
            }
            // Stay until the server closes the connection or this task is aborted.
            drop(client.read_to_end(&mut Vec::new()).await);
        }));
    }
    echo.says("accept.stalled").await;
    (echo, clients, who_is_served)
}

#[tokio::test]
async fn a1_a2_out_of_descriptors_it_says_so_once_rests_and_goes_on_when_one_is_free() {
    let (mut echo, clients, mut served) = exhausted().await;

    // This sleep is part of a measurement: the cost of being out of descriptors for a while.
    let (cpu, begun) = (echo.cpu(), Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let busy = (echo.cpu() - cpu).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("busy while out of descriptors: {:.1} %", 100.0 * busy);
    assert!(busy < 0.05);
    assert_eq!(echo.logged("accept.stalled"), 0, "it was said already");

    let mut inside = Vec::new();
    while let Ok(n) = served.try_recv() {
        inside.push(n);
    }
    assert!((40..64).contains(&inside.len()), "{} are in", inside.len());
    let left = Instant::now();
    clients[inside[0]].abort();
    let next = timeout(NET, served.recv()).await.unwrap().unwrap();
    let waited = left.elapsed();
    println!("from a free descriptor to the next client's reply: {waited:?}");
    assert!(!inside.contains(&next));
    assert!(waited <= Duration::from_millis(50), "{waited:?}");
}

/// The server watches for a reset of each half-closed client that waits, by a second descriptor.
#[tokio::test]
async fn half_closed_clients_leave_descriptors_to_the_accept_loop() {
    const CLIENTS: usize = 100;
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "ulimit -n 200; exec \"$0\" \"$@\""])
        .arg(example("stack"))
        .args(["--accepts", "100000", "--timeout", "60000"]);
    let mut stack = start(&mut shell).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = stack.connect().await;
        client.write_all(b"sleep 50000\n").await.expect("open");
        client.shutdown().await.expect("it is open");
        clients.push(client);
    }

    // It is accepted after the others.
    let mut last = stack.connect().await;
    let mut greeting = String::new();
    let greeted = timeout(NET, last.read_line(&mut greeting)).await;

    greeted.expect("in time").expect("it is open");
    assert_eq!(stack.logged("accept.stalled"), 0);
}

#[tokio::test]
async fn a12_a_process_that_gets_no_more_memory_serves_or_ends_and_never_hangs() {
    let mut echo = start(&mut Command::new(self::echo())).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", echo.pid()));
    let status = status.expect("the example runs");
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let data = data.expect("the system says so").trim_end_matches("kB");
    let data: u64 = data.trim().parse().expect("a number of KiB");
    let most = Some((data + 256) * 1024);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    let pid = i32::try_from(echo.pid()).ok().and_then(Pid::from_raw);
    prlimit(pid, Resource::Data, limit).expect("it is ours");

    // 16 MB of incomplete lines.
    let half_a_line = vec![b'x'; 32 * 1024];
    let mut clients = Vec::new();
    for _ in 0..500 {
        let connected = timeout(NET, TcpStream::connect(&echo.addr)).await;
        let Ok(mut client) = connected.expect("neither refused nor accepted") else {
            break;
        };
        let sent = timeout(NET, client.write_all(&half_a_line)).await;
        drop(sent.expect("it reads or closes"));
        clients.push(client);
    }

    let another = async {
        let mut client = TcpStream::connect(&echo.addr).await.ok()?;
        client.write_all(b"hi\n").await.ok()?;
        client.read_exact(&mut [0; 3]).await.ok()
    };
    let outcome = match timeout(NET, another).await.expect("it answers or closes") {
        Some(_reply) => "it serves".to_owned(),
        None => {
            let ended = timeout(NET, echo.child.wait()).await;
            ended.expect("it has ended").expect("it ran").to_string()
        }
    };
    println!("with {data} KiB of data, and 256 KiB more: {outcome}");
}

/// Run by hand, because the clients and the server have 18,000 descriptors each.
#[tokio::test]
#[ignore = "takes many descriptors"]
async fn a9_eighteen_thousand_clients_at_once_are_all_served() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("it may be raised so far");
    let echo = start(&mut Command::new(self::echo())).await;
    let begun = Instant::now();

    let clients: Vec<_> = (0..18_000)
        .map(|_| {
            let addr: SocketAddr = echo.addr.parse().expect("an address");
            tokio::spawn(async move {
                let client = TcpStream::connect(addr).await.expect("nobody is refused");
                let mut client = BufReader::new(client);
                ask(&mut client).await;
                (client, begun.elapsed())
            })
        })
        .collect();

    let mut served = Vec::new();
    for client in clients {
        served.push(client.await.expect("it is served"));
    }
    let last = served.iter().map(|(_, after)| *after).max();
    println!("{} clients were served within {last:?}", served.len());
}

#[tokio::test]
async fn h14_a_shutdown_is_not_delayed_by_a_back_off() {
    let (mut echo, clients, mut served) = exhausted().await;
    // The back-off reaches its longest wait, 1 s, after 1.3 s.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut inside = Vec::new();
    while let Ok(n) = served.try_recv() {
        inside.push(n);
    }
    let begun = Instant::now();

    echo.terminate().await;

    for (n, client) in clients.into_iter().enumerate() {
        if inside.contains(&n) {
            timeout(NET, client).await.unwrap().unwrap();
        }
    }
    let waited = begun.elapsed();
    println!("from the signal to the last close: {waited:?}");
    assert!(waited <= Duration::from_millis(200), "{waited:?}");
    let exit = timeout(NET, echo.child.wait()).await.unwrap().unwrap();
    assert!(exit.success(), "{exit}");
}

/// Runs the example under `strace`, which makes system calls fail.
async fn failing(inject: &str) -> Option<Echo> {
    let (call, _) = inject.split_once(':').expect("call:error");
    let trace = format!("trace={call}");
    let inject = format!("inject={inject}");
    under_strace(&["-o", "/dev/null", "-e", &trace, "-e", &inject]).await
}

/// Runs the example under `strace`, unless strace is not installed.
async fn under_strace(options: &[&str]) -> Option<Echo> {
    let there = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .await
        .is_ok_and(|status| status.success());
    if !there {
        assert!(std::env::var_os("CI").is_none(), "strace is not installed");
        println!("skipped: strace is not installed");
        return None;
    }
    let mut strace = Command::new("strace");
    strace
        // -D makes the example, and not strace, our child.
        .args(["-D", "-f"])
        .args(options)
        // strace counts the calls of each thread separately, so only one thread may accept.
        .env("TOKIO_WORKER_THREADS", "1")
        .arg(echo());
    Some(start(&mut strace).await)
}

#[tokio::test]
async fn a3_the_loop_survives_every_error_of_accept_five_times_in_a_row() {
    for errno in [
        "EMFILE",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
        "ECONNABORTED",
        "EPROTO",
        "EPERM",
        "EINTR",
        "ENETDOWN",
        "ENOPROTOOPT",
        "EHOSTDOWN",
        "ENONET",
        "EHOSTUNREACH",
        "EOPNOTSUPP",
        "ENETUNREACH",
        "ETIMEDOUT",
        "ECONNREFUSED",
        "ECONNRESET",
        "EINVAL",
        "EIO",
    ] {
        let Some(mut echo) = failing(&format!("accept4:error={errno}:when=20..24")).await else {
            return;
        };
        let mut clients = Vec::new();

        for _ in 1..=25 {
            let mut client = echo.connect().await;
            ask(&mut client).await;
            clients.push(client);
        }

        // The error did occur. It is logged as `accept.error` or as `accept.stalled`.
        echo.says("accept.").await;
    }
}

#[tokio::test]
async fn a8_a_connection_is_served_without_an_option_that_could_not_be_set() {
    // The first call is for the listener.
    let Some(mut echo) = failing("setsockopt:error=EINVAL:when=2+").await else {
        return;
    };

    for _ in 0..3 {
        let mut client = echo.connect().await;
        ask(&mut client).await;
    }

    echo.says("could not be set").await;
}

/// A raw loop in a task of tokio needs as many. A loop in the future of `block_on` wakes the driver
/// two or three times for each connection, and a socket that is accepted without flags needs two
/// calls of fcntl.
#[tokio::test]
async fn a_connection_of_one_line_needs_as_few_system_calls_as_in_a_raw_loop() {
    const CONNECTIONS: usize = 100;
    // Without `-o`, strace writes to the example's stderr. `-y` adds what a descriptor is.
    let Some(mut echo) = under_strace(&["-y"]).await else {
        return;
    };
    for _ in 0..CONNECTIONS {
        let mut client = echo.connect().await;
        ask(&mut client).await;
        client.shutdown().await.expect("it is open");
        let end = timeout(NET, client.read_to_end(&mut Vec::new())).await;
        end.expect("in time").expect("it closes gracefully");
    }
    echo.terminate().await;

    let mut trace = String::new();
    while let Some(line) = timeout(NET, echo.log.recv()).await.expect("it ends") {
        trace.push_str(&line);
    }
    let each = |call: &str| {
        let each = trace.matches(call).count() as f64 / CONNECTIONS as f64;
        println!("{call}..: {each}");
        each
    };
    // The calls at the start and the end of the process are counted, too.
    assert!((1.0..1.2).contains(&each("accept4(")));
    // Some architectures have only `epoll_pwait`.
    let waits = each("epoll_wait(") + each("epoll_pwait(");
    assert!((1.0..4.0).contains(&waits));
    assert!((1.0..2.2).contains(&each("epoll_ctl(")));
    // Written to wake the driver.
    assert!(each("<anon_inode:[eventfd]>, ") < 1.7);
    assert!(each("setsockopt(") < 0.2);
    assert!(each("F_SETFL") < 0.2);
}

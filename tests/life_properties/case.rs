//! One case: a server, a few connections, and the checks at their end.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::pipeline::Limits;
use tower_tcp::{
    Address, BoxError, Connection, ConnectionInfo, EndReason, Handle, Pipeline, Server, testkit,
};

use super::check::check;
use super::peer::{ask, read};
use super::program::marks;
use super::random::Random;
use super::record::{Case, Conn, Way};
use super::service::{make, raw};
use super::wire::{Kind, LINES, Modal, Out, PREFIXED, Tag, Watched};
use super::{DRAIN_DEADLINE, IN_FLIGHT, NET, STEP};

/// Runs a few connections of a server to their end. Returns the number of operations.
pub(crate) async fn run(seed: u64) -> Result<usize, String> {
    let mut random = Random(seed);
    let way = match random.below(4) {
        0 => Way::InFlight,
        1 => Way::Multiplexed,
        _ => Way::OneAtATime,
    };
    let case = Arc::new(Case {
        way,
        two_legs: random.one_in(2),
        shutdown_on_error: random.one_in(2),
        marks: marks(&mut random),
        buffer: 16 + random.size(2000),
        push_queue: 1 + random.size(8),
        messages: 1 + random.size(8),
        read_ahead: random.size(2000),
    });
    let conns: Vec<_> = (0..4)
        .map(|_| Arc::new(Conn::new(Arc::clone(&case), random.fork())))
        .collect();
    let (handle, server, connector) = serve(&case, conns.clone());

    let mut peers = Vec::new();
    for conn in &conns {
        let (read_half, write_half) = tokio::io::split(connector.connect().await.unwrap());
        let (asks, reads) = (random.fork(), random.fork());
        peers.push(tokio::spawn(ask(Arc::clone(conn), write_half, asks)));
        peers.push(tokio::spawn(read(Arc::clone(conn), read_half, reads)));
    }
    let drain_at = if random.one_in(3) {
        random.steps(100)
    } else {
        Duration::from_secs(40)
    };
    sleep(drain_at).await;
    for conn in &conns {
        conn.did("drain");
        conn.log().drained = true;
    }
    handle.shutdown_within(DRAIN_DEADLINE);
    let ended = timeout(NET, handle.closed()).await;

    let context = |conn: &Conn, err: String| {
        let log = conn.log();
        let mut text = format!("{err}\n{case:?}\n");
        for (at, what) in &log.history {
            let at = at.duration_since(log.begun_at);
            writeln!(text, "{at:>8.0?} {what}").unwrap();
        }
        text
    };
    for conn in &conns {
        if ended.is_err() && conn.log().ends.is_empty() {
            return Err(context(conn, "it never ended".into()));
        }
        conn.over.notify_one();
    }
    for task in peers.into_iter().chain([server]) {
        joined(task).await.map_err(|err| context(&conns[0], err))?;
    }
    for conn in &conns {
        loop {
            let Some(task) = conn.log().tasks.pop() else {
                break;
            };
            joined(task).await.map_err(|err| context(conn, err))?;
        }
        let checked = conn.log().check(&case);
        checked.map_err(|err| context(conn, err))?;
    }
    check!(handle.live() == 0, "{} are live", handle.live());
    let in_use = handle.limit().in_use();
    check!(in_use == 0, "{in_use} permits are in use");
    // A joined task is removed from the runtime a turn later.
    sleep(STEP).await;
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    check!(tasks == 0, "{tasks} tasks are left");
    Ok(conns.iter().map(|conn| conn.log().history.len()).sum())
}

pub(crate) async fn joined(task: JoinHandle<()>) -> Result<(), String> {
    match timeout(NET, task).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(panicked)) => Err(panicked.to_string()),
        Err(_) => Err("a task never ended".into()),
    }
}

pub(crate) fn serve(
    case: &Arc<Case>,
    conns: Vec<Arc<Conn>>,
) -> (Handle, JoinHandle<()>, testkit::Connector) {
    let (listener, connector) = testkit::memory_with_buffer(case.buffer);
    let server = Server::from_listener(listener);
    let handle = server.handle();
    let limits = Limits::default()
        .watermarks(case.marks)
        .push_queue(case.push_queue)
        .messages(case.messages)
        .read_ahead(case.read_ahead);
    let deadlines = Deadlines::default().first_byte(None).idle(None).frame(None);
    let modal = |leg| move || Modal { leg, block: 0 };
    let second = Pipeline::new(modal(PREFIXED))
        .make_event_service(make(PREFIXED))
        .limits(limits.clone())
        .deadlines(deadlines)
        .shutdown_on_error(case.shutdown_on_error)
        .farewell(farewell(PREFIXED))
        .on_upgrade(service_fn(raw));
    let first = Pipeline::new(modal(LINES))
        .make_event_service(make(LINES))
        .limits(limits)
        .deadlines(deadlines)
        .shutdown_on_error(case.shutdown_on_error)
        .farewell(farewell(LINES));
    let task = match (case.way, case.two_legs) {
        (Way::InFlight, _) => spawn(server, conns, first.in_flight(IN_FLIGHT)),
        (Way::Multiplexed, _) => spawn(server, conns, first.multiplexed(IN_FLIGHT)),
        (Way::OneAtATime, true) => spawn(server, conns, first.on_upgrade(second)),
        (Way::OneAtATime, false) => spawn(server, conns, first.on_upgrade(service_fn(raw))),
    };
    (handle, task, connector)
}

fn farewell(leg: usize) -> impl Fn(&ConnectionInfo, EndReason) -> Out {
    move |info, _| Out {
        conn: Arc::clone(info.get::<Arc<Conn>>().unwrap()),
        leg,
        tag: Tag {
            kind: Kind::Farewell,
            of: leg,
            n: 0,
        },
        block: 0,
    }
}

pub(crate) fn spawn<S>(
    server: Server<testkit::MemoryListener>,
    conns: Vec<Arc<Conn>>,
    pipeline: S,
) -> JoinHandle<()>
where
    S: Service<Connection<Watched>, Error = BoxError, Future: Send> + Send + 'static,
    S::Response: 'static,
{
    let stack = ServiceBuilder::new()
        .map_request(move |mut conn: Connection<DuplexStream>| {
            let Address::Memory(number) = conn.info().peer_addr() else {
                panic!("it is served in memory");
            };
            let ours = Arc::clone(&conns[usize::try_from(*number).unwrap() - 1]);
            let ending = Arc::clone(&ours);
            conn.on_end(move |end| ending.log().ends.push(end.clone()));
            conn.insert(Arc::clone(&ours));
            conn.map_io(|io| Watched { io, conn: ours })
        })
        .service(pipeline);
    tokio::spawn(async move {
        server.serve(stack).await.unwrap();
    })
}

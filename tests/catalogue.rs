//! The catalogue, which is the page of the module `observe`, lists every span, event and metric of
//! the code with its level, fields and attributes, and nothing else.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/recorded.rs"]
mod recorded;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::ready;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use metrics::{Unit, set_default_local_recorder};
use rustix::io::Errno;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::{Incoming, Listener, Socket, SocketOptions, Sockets};
use tower_tcp::frame::Lines;
use tower_tcp::observe::{RequestMetricsLayer, describe_metrics};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::serve_with;
use tower_tcp::tls::Tls;
use tower_tcp::{Address, BoxError, Connection, EndReason, Pipeline, Server};

use certificates::certified;
use recorded::{Kind, Recorded};
use support::{Client, Ends};

type Names = BTreeSet<String>;

const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// A row of a table without its first column, the name.
type Row = Vec<String>;

/// Parses the tables of the page, by the header of their first column.
fn page() -> BTreeMap<String, BTreeMap<String, Row>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/observe/mod.rs");
    let source = fs::read_to_string(source).unwrap();
    let mut tables = BTreeMap::<_, BTreeMap<_, _>>::new();
    let mut head = None;
    for line in source.lines() {
        let Some(row) = line.strip_prefix("//! |") else {
            head = None;
            continue;
        };
        let mut cells = row.split('|').map(|cell| cell.trim().to_owned());
        let first = cells.next().unwrap();
        let rest = cells.collect();
        match &head {
            None => head = Some(first),
            Some(_) if first == "---" => {}
            Some(head) => {
                let name = first.trim_matches('`').to_owned();
                let rows = tables.entry(head.clone()).or_default();
                assert!(rows.insert(name, rest).is_none(), "{first} is there twice");
            }
        }
    }
    tables
}

/// Returns the names in a cell, without values in parentheses or after `=`.
fn names(cell: &str) -> Names {
    let (mut names, mut inside, mut value) = (Names::new(), 0_usize, false);
    for (at, part) in cell.split('`').enumerate() {
        if at % 2 == 0 {
            inside += part.matches('(').count();
            inside -= part.matches(')').count();
            value = part.trim() == "=";
        } else if inside == 0 && !value {
            names.insert(part.to_owned());
        }
    }
    names
}

/// Returns the values that a cell lists for an attribute, in parentheses after it.
fn values<'a>(cell: &'a str, attribute: &str) -> Option<Vec<&'a str>> {
    let (_, values) = cell.split_once(&format!("`{attribute}` ("))?;
    let (values, _) = values.split_once(')')?;
    Some(values.split('`').skip(1).step_by(2).collect())
}

/// A span or an event in the code.
#[derive(Debug)]
struct Emitted {
    span: bool,
    name: String,
    level: String,
    fields: Names,
}

/// Finds every span and event of the code.
fn code() -> Vec<Emitted> {
    let mut found = Vec::new();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut directories = vec![src];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|rs| rs == "rs") {
                let source = fs::read_to_string(path).unwrap();
                let code = source
                    .lines()
                    .filter(|line| !line.trim_start().starts_with("//"));
                emitted(&code.collect::<Vec<_>>().join("\n"), &mut found);
            }
        }
    }
    found
}

fn emitted(code: &str, found: &mut Vec<Emitted>) {
    const MACROS: [&str; 8] = [
        "event",
        "error",
        "warn",
        "info",
        "debug",
        "trace",
        "info_span",
        "debug_span",
    ];
    for (at, _) in code.match_indices("tracing::") {
        let call = &code[at + "tracing::".len()..];
        let Some((name, rest)) = call.split_once("!(") else {
            continue;
        };
        if !MACROS.contains(&name) {
            continue;
        }
        let mut one = Emitted {
            span: name.ends_with("_span"),
            name: String::new(),
            level: name.trim_end_matches("_span").to_owned(),
            fields: Names::new(),
        };
        read(inside(rest), &mut one);
        found.push(one);
    }
}

/// Returns the text before the closing parenthesis or brace.
fn inside(code: &str) -> &str {
    let (mut depth, mut quoted) = (0, false);
    for (at, c) in code.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '(' | '{' if !quoted => depth += 1,
            ')' | '}' if !quoted && depth == 0 => return &code[..at],
            ')' | '}' if !quoted => depth -= 1,
            _ => {}
        }
    }
    panic!("it is not closed: {code}");
}

/// Parses the arguments of a macro.
fn read(mut arguments: &str, into: &mut Emitted) {
    while !arguments.trim().is_empty() {
        arguments = arguments.trim_start();
        let end = comma(arguments);
        let argument = arguments[..end].trim();
        arguments = arguments.get(end + 1..).unwrap_or_default();
        if let Some(group) = argument.strip_prefix('{') {
            read(inside(group), into);
        } else if argument.starts_with('"') {
            into.name = argument.trim_matches('"').to_owned();
        } else if argument.starts_with("target:") {
            assert_eq!(argument, "target: \"tower_tcp\"");
        } else if !argument.starts_with('$') {
            let field = argument.split('=').next().unwrap_or_default();
            let field = field.trim_matches(['%', '?', ' ']);
            into.fields.insert(field.to_owned());
        }
    }
}

/// Returns the end of the first argument.
fn comma(arguments: &str) -> usize {
    let (mut depth, mut quoted) = (0, false);
    let end = arguments.char_indices().find(|(_, c)| {
        match c {
            '"' => quoted = !quoted,
            '(' | '{' if !quoted => depth += 1,
            ')' | '}' if !quoted => depth -= 1,
            _ => {}
        }
        *c == ',' && depth == 0 && !quoted
    });
    end.map_or(arguments.len(), |(at, _)| at)
}

#[test]
fn the_page_has_each_span_and_event_of_the_code_with_its_level_and_fields() {
    let page = page();

    let code = code();

    for (head, span) in [("span", true), ("event", false)] {
        let rows = &page[head];
        let of_code: Names = code
            .iter()
            .filter(|one| one.span == span)
            .map(|one| one.name.clone())
            .collect();
        assert_eq!(rows.keys().cloned().collect::<Names>(), of_code);
        for one in code.iter().filter(|one| one.span == span) {
            let fields = names(&rows[&one.name][1]);
            assert_eq!(fields, one.fields, "{}", one.name);
        }
        for (name, row) in rows {
            let levels: Names = code
                .iter()
                .filter(|one| one.span == span && one.name == *name)
                .map(|one| one.level.clone())
                .collect();
            // The level of `connection.closed` depends on the reason. `tests/observe.rs` checks it.
            if levels.contains("event") {
                continue;
            }
            let words = row[0].split([' ', ',']);
            let on_page = words.filter(|word| LEVELS.contains(word));
            let on_page: Names = on_page.map(str::to_owned).collect();
            assert_eq!(on_page, levels, "{name}");
        }
    }
}

#[test]
fn what_is_planted_is_read() {
    let code = r#"
        tracing::warn!(target: "tower_tcp", { a.b = %f(1, "x,y"), %error }, "it, (happened)");
        let span =
            tracing::debug_span!(target: "tower_tcp", "a span", otel.kind = "server", c = Empty);
        tracing::field::display(1);
    "#;
    let mut found = Vec::new();

    emitted(code, &mut found);

    let [event, span] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(
        (&event.name[..], &event.level[..], event.span),
        ("it, (happened)", "warn", false)
    );
    assert_eq!(event.fields, Names::from(["a.b".into(), "error".into()]));
    assert_eq!(
        (&span.name[..], &span.level[..], span.span),
        ("a span", "debug", true)
    );
    assert_eq!(span.fields, Names::from(["otel.kind".into(), "c".into()]));
    assert_eq!(
        names("`a` = `1`, `b` (`x`: [`Y`](z)), `c`; `d` as that"),
        Names::from(["a".into(), "b".into(), "c".into(), "d".into()])
    );
    assert_eq!(
        values("`a` (`x`; `y`: z), `b` (`w`)", "a"),
        Some(vec!["x", "y"])
    );
}

/// Fails once, then accepts.
struct FailsOnce(Sockets, Option<io::Error>);

impl Listener for FailsOnce {
    type Io = Socket;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_readable(cx)
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Socket>>> {
        match self.1.take() {
            Some(failure) => Poll::Ready(Err(failure)),
            None => self.0.poll_accept(cx),
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.0.local_addrs()
    }
}

/// Makes a server do everything that is measured: it accepts, fails to accept, serves, fails to
/// serve, rejects, and has a handshake time out.
async fn all_there_is_to_measure() {
    let (server, client) = certified();
    let options = SocketOptions::default();
    let sockets = Sockets::bind(vec!["127.0.0.1:0".into()], &options).await;
    let failing = FailsOnce(sockets.unwrap(), Some(Errno::CONNABORTED.into()));
    let service = ServiceBuilder::new()
        .layer(RequestMetricsLayer::new())
        .service_fn(|line: Bytes| {
            ready(match &line[..] {
                b"fail" => Err(BoxError::from("as asked")),
                _ => Ok(line),
            })
        });
    let hook = service_fn(|conn: Connection<Socket>| {
        ready(match conn.info().id().get() % 2 {
            0 => Err(BoxError::from("an even number")),
            _ => Ok(conn),
        })
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .layer(PreConnectLayer::new(Tls::from(server)))
        .service(Pipeline::new(Lines::default).service(service));
    let server = Server::builder().name("measured").build(failing);
    let served = serve_with(server, (), stack);
    let address = served.handle().local_addrs()[0].tcp().unwrap();

    let mut reasons = BTreeMap::new();
    let wanted = [
        EndReason::ServiceError,
        EndReason::Rejected,
        EndReason::TlsHandshakeFailed,
    ];
    while wanted
        .iter()
        .any(|reason| !reasons.contains_key(reason.as_str()))
    {
        let io = TcpStream::connect(address).await.unwrap();
        if reasons.contains_key(EndReason::ServiceError.as_str()) {
            drop(io);
        } else {
            let name = ServerName::try_from("localhost").unwrap();
            let tls = TlsConnector::from(Arc::clone(&client))
                .connect(name, io)
                .await;
            if let Ok(io) = tls {
                let mut client = Client::new(io);
                client.ask("hi").await;
                client.send("fail\n").await;
                client.rest().await;
            }
        }
        let reason = served.reason().await;
        reasons.insert(reason.as_str(), reason);
    }
    while served.handle().live() > 0 {
        tokio::task::yield_now().await;
    }
    served.handle().collect_metrics();
}

#[tokio::test]
async fn the_page_has_each_metric_with_its_kind_unit_and_attributes() {
    let rows = &page()["metric"];
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    describe_metrics();

    all_there_is_to_measure().await;

    let described = recorded.described();
    let of_page: Names = rows.keys().cloned().collect();
    assert_eq!(described.keys().cloned().collect::<Names>(), of_page);
    for (name, row) in rows {
        let kind = match described[name] {
            (Kind::Counter, _) => "counter",
            (Kind::Gauge, _) => "gauge",
            (Kind::Histogram, _) => "histogram",
        };
        let units: &[&str] = match described[name] {
            (_, Some(Unit::Bytes)) => &["bytes"],
            (_, Some(Unit::Seconds)) => &["seconds"],
            _ => &["connections", "errors", "requests"],
        };
        let (said, unit) = row[0].split_once(", ").unwrap();
        assert_eq!(said, kind, "{name}");
        assert!(units.contains(&unit), "{name}: {unit}");

        let mut attributes = Names::new();
        let series = recorded.series(Some(name), &[]);
        for series in &series {
            assert_eq!(series.kind, described[name].0, "{name}");
            for (attribute, value) in &series.attributes {
                attributes.insert(attribute.clone());
                if let Some(values) = values(&row[1], attribute)
                    && !(name == "tower_tcp.accept.errors" && attribute == "error.type")
                {
                    assert!(
                        values.contains(&&value[..]),
                        "{name}: {attribute} is {value}"
                    );
                }
            }
        }
        assert!(!series.is_empty(), "{name} was not recorded");
        assert_eq!(attributes, names(&row[1]), "{name}");
    }
}

//! The catalogue, the page of the module `observe`: it has each span and event of the code, with its level and fields, and no other.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

type Names = BTreeSet<String>;

/// A row of a table: the columns behind the name.
type Row = Vec<String>;

/// Reads the page's tables, by what is in the head of their first column.
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

/// The names in a cell, without the values that stand in parentheses or behind a `=`.
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

/// A span or an event in the code.
#[derive(Debug)]
struct Emitted {
    span: bool,
    name: String,
    level: String,
    fields: Names,
}

/// Finds all that the code emits.
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

/// Returns what stands before the parenthesis or brace that closes.
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

/// Reads the arguments of a macro.
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

/// Returns where the first argument ends.
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
            let (level, fields) = (&rows[&one.name][0], names(&rows[&one.name][1]));
            assert_eq!(fields, one.fields, "{}", one.name);
            // One event has its level by the reason; it is held to that in `tests/observe.rs`.
            if one.level != "event" {
                assert_eq!(*level, one.level, "{}", one.name);
            }
        }
    }
}

#[test]
fn what_is_planted_is_read() {
    let code = r#"
        tracing::warn!(target: "tower_tcp", { a.b = %f(1, "x,y"), %error }, "it, (happened)");
        let span = tracing::debug_span!(target: "tower_tcp", "a span", otel.kind = "server", c = Empty);
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
}

//! A module names only modules that `lib.rs` lists at or above it. So the list is a map of the
//! crate, and no cycle can form.
//!
//! The files inside a module, a room, have no list, but they form no cycle, either. Three rules say
//! what counts:
//!
//! - A file names another when it imports from it or writes a path into it, also through a
//!   re-export of the `mod.rs` between them.
//! - For its neighbours, a directory counts as one file. Its own files are checked among
//!   themselves.
//! - A `mod.rs` is the trunk: it may name its children, and they may name what it defines. That is
//!   no cycle.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

#[test]
fn a_module_names_only_modules_at_or_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, "", &mut files);
    let lib = files
        .iter()
        .position(|(name, _)| name == "lib.rs")
        .expect("src/lib.rs is there");
    let (_, lib) = files.swap_remove(lib);

    let found = violations(&lib, &files);

    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_files_of_a_room_form_no_cycle() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, "", &mut files);

    let found = cycles(&files);

    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn planted_cycles_are_found_and_nothing_else_is() {
    let files = [
        ("lib.rs", "mod room; mod other; pub use room::Upgrade;"),
        (
            "room/mod.rs",
            "mod reply; mod upgrade; mod deep; mod plain; pub use reply::Reply;\n\
            use upgrade::Upgrade;\nstruct Trunk(Reply, Upgrade);",
        ),
        // Through the re-export of `lib.rs`, and of `mod.rs`.
        ("room/reply.rs", "\nuse crate::Upgrade;\nuse super::Trunk;"),
        ("room/upgrade.rs", "use super::{Trunk, Reply};"),
        // A directory is one file to its neighbours.
        (
            "room/deep/mod.rs",
            "mod a; mod b; mod c; use super::plain::Plain;",
        ),
        (
            "room/deep/a.rs",
            "use super::b::B;\nfn f() { crate::room::reply::f() }",
        ),
        ("room/deep/b.rs", "fn f() { super::c::f() }"),
        ("room/deep/c.rs", "use super::super::deep::a::A;"),
        // Comments, tests and other crates do not count.
        (
            "room/plain.rs",
            "//! [`A`](super::deep::A)\nuse deep::A;\n#[cfg(test)]\n\
             mod tests { use super::super::deep::A; }",
        ),
        ("other.rs", "use crate::room::Reply;"),
    ];
    let files = files.map(|(name, text)| (name.to_owned(), text.to_owned()));

    assert_eq!(
        cycles(&files),
        [
            "src/room/deep/a.rs:1: `room::deep::a` names `room::deep::b`, which leads back to it",
            "src/room/deep/b.rs:1: `room::deep::b` names `room::deep::c`, which leads back to it",
            "src/room/deep/c.rs:1: `room::deep::c` names `room::deep::a`, which leads back to it",
            "src/room/reply.rs:2: `room::reply` names `room::upgrade`, which leads back to it",
            "src/room/upgrade.rs:1: `room::upgrade` names `room::reply`, which leads back to it",
        ]
    );
}

#[test]
fn planted_violations_are_found_and_nothing_else_is() {
    let lib = r#"
        //! mod ghost;
        pub mod error;
        mod middle; pub mod tail;
        #[cfg(feature = "tls")]
        pub mod tls;
        pub use error::{BoxError, Error as Failure};
        pub use tail::{inner::Tail, end::*};
    "#;
    let innocent = r##"
        //! See [`Tail`](crate::Tail). /* crate::tls */
        use crate::{BoxError, error::{self, Failure}};
        /* crate::tls /* nested */ crate::tls */
        fn f<'a>(_: &'a str) -> char { let _ = ("\" crate::tls", r#"" crate::tls"#, b'"'); '"' }
        mod imp { use super::f; }
        #[cfg(test)]
        mod tests { use crate::tail::Tail; fn g() { {} } }
        #[cfg(test)]
        use crate::tls::{A, B};
    "##;
    let guilty = "use crate::tail::inner::Tail;\n\
        use crate::{error::{self, BoxError}, tls::{a, b}};\n\
        type A = crate::Tail;\ntype B = super::tls::Tls;\ntype C = crate::ghost::C;\n";
    let files = [
        ("error.rs", "use crate::error::BoxError;"),
        ("middle.rs", innocent),
        ("middle/deep.rs", "use super::tls; use super::super::Tail;"),
        ("middle/tests.rs", "use crate::tail::Tail;"),
        ("middle/mod.rs", guilty),
        ("tail.rs", "use crate::{middle, Failure};"),
        ("stray.rs", ""),
    ];
    let files = files.map(|(name, text)| (name.to_owned(), text.to_owned()));

    assert_eq!(
        violations(lib, &files),
        [
            "src/middle/deep.rs:1: `middle` names `Tail` of `tail`, which is below it",
            "src/middle/mod.rs:1: `middle` names `tail`, which is below it",
            "src/middle/mod.rs:2: `middle` names `tls`, which is below it",
            "src/middle/mod.rs:3: `middle` names `Tail` of `tail`, which is below it",
            "src/middle/mod.rs:4: `middle` names `tls`, which is below it",
            "src/middle/mod.rs:5: `middle` names `ghost`, \
             which lib.rs neither lists nor re-exports",
            "src/stray.rs: lib.rs does not list `stray`",
        ]
    );
}

/// Reads all Rust files under `dir`, named by their path relative to `src`.
fn collect(dir: &Path, prefix: &str, files: &mut Vec<(String, String)>) {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .expect("src can be listed")
        .flatten()
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (
            entry.path(),
            format!("{prefix}{}", entry.file_name().display()),
        );
        if path.is_dir() {
            collect(&path, &format!("{name}/"), files);
        } else if name.ends_with(".rs") {
            files.push((name, fs::read_to_string(path).expect("sources are text")));
        }
    }
}

/// Returns whether a file consists of tests alone.
fn is_test(file: &str) -> bool {
    file.ends_with("/tests.rs") || file.contains("/tests/")
}

/// Checks `files` against the order of modules in `lib`.
fn violations(lib: &str, files: &[(String, String)]) -> Vec<String> {
    let (order, exports) = read_lib(lib);
    let place = |module: &str| order.iter().position(|listed| listed == module);
    let mut found = Vec::new();
    for (file, source) in files {
        let module = file.split(['/', '.']).next().unwrap_or_default();
        let Some(own) = place(module) else {
            found.push(format!("src/{file}: lib.rs does not list `{module}`"));
            continue;
        };
        if is_test(file) {
            continue;
        }
        let code = without_tests(without_comments(source));
        for (at, name) in root_names(&code, depth(file)) {
            let target = exports.get(&name).unwrap_or(&name);
            let problem = match place(target) {
                Some(other) if other <= own => continue,
                Some(_) if *target == name => format!("`{name}`, which is below it"),
                Some(_) => format!("`{name}` of `{target}`, which is below it"),
                // In a module inside the file, `super` is not the root.
                None if name == "self" || code[at..].starts_with("super") => continue,
                None => format!("`{name}`, which lib.rs neither lists nor re-exports"),
            };
            let line = code[..at].matches('\n').count() + 1;
            found.push(format!("src/{file}:{line}: `{module}` names {problem}"));
        }
    }
    found
}

/// The path of a module from the crate's root. The root's own path is empty.
type ModulePath = Vec<String>;

/// Returns each place where a file of a room names another file that names it back, directly or
/// through others.
fn cycles(files: &[(String, String)]) -> Vec<String> {
    let sources: BTreeMap<ModulePath, (&String, String)> = files
        .iter()
        .filter(|(name, _)| !is_test(name))
        .map(|(name, text)| {
            (
                module_path(name),
                (name, without_tests(without_comments(text))),
            )
        })
        .collect();
    let imports: HashMap<&ModulePath, HashMap<String, ModulePath>> = sources
        .iter()
        .map(|(module, (_, code))| (module, imports(module, code)))
        .collect();
    // Each pair of children of one module of which the first names the second, and the place.
    let mut names = BTreeMap::new();
    for (module, (file, code)) in &sources {
        for (at, path) in paths(module, code) {
            let target = resolve(path, &sources, &imports, 0);
            let shared = module.iter().zip(&target).take_while(|(a, b)| a == b);
            let shared = shared.count();
            // `violations` checks names between rooms. A trunk and its children may name each
            // other.
            if shared > 0 && shared < module.len() && shared < target.len() {
                let line = code[..at].matches('\n').count() + 1;
                names
                    .entry((module[..=shared].join("::"), target[..=shared].join("::")))
                    .or_insert(format!("src/{file}:{line}"));
            }
        }
    }
    let mut found: Vec<_> = names
        .iter()
        .filter(|((from, to), _)| leads(to, from, &names, &mut BTreeSet::new()))
        .map(|((from, to), place)| {
            format!("{place}: `{from}` names `{to}`, which leads back to it")
        })
        .collect();
    found.sort();
    found
}

/// Returns whether names lead from one file to another.
fn leads<'a>(
    from: &'a str,
    to: &str,
    names: &'a BTreeMap<(String, String), String>,
    seen: &mut BTreeSet<&'a str>,
) -> bool {
    from == to
        || (seen.insert(from)
            && names
                .keys()
                .filter(|(named_by, _)| named_by == from)
                .any(|(_, next)| leads(next, to, names, seen)))
}

/// Returns the module that a file holds.
fn module_path(file: &str) -> ModulePath {
    let file = file.trim_end_matches(".rs").trim_end_matches("/mod");
    let path = file.split('/').filter(|part| *part != "lib");
    path.map(str::to_owned).collect()
}

/// Returns what each name that a module imports stands for.
fn imports(module: &ModulePath, code: &str) -> HashMap<String, ModulePath> {
    let mut imports = HashMap::new();
    for (at, _) in code.match_indices("use ") {
        let is_word = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let item = &code[at + "use ".len()..];
        let item = &item[..item.find(';').unwrap_or(item.len())];
        for path in spell_out(item).iter().filter(|_| is_word) {
            let name = path.rsplit([':', ' ']).next().unwrap_or(path);
            if let Some(path) = absolute(module, path) {
                imports.insert(name.to_owned(), path);
            }
        }
    }
    imports
}

/// Returns each path in `code` that begins at the crate's root or at a parent, and its position.
fn paths(module: &ModulePath, code: &str) -> Vec<(usize, ModulePath)> {
    let mut found = Vec::new();
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let inside = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            if code[..at].ends_with(inside) {
                continue;
            }
            let path = &code[at..];
            let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '{';
            let end = path.find(|c| !is_path(c)).unwrap_or(path.len());
            let brace = path[..end].find('{');
            let end = brace.map_or(end, |brace| brace + block(&path[brace..]).len());
            let spelled = spell_out(&path[..end]);
            found.extend(
                spelled
                    .iter()
                    .filter_map(|path| Some((at, absolute(module, path)?))),
            );
        }
    }
    found
}

/// Converts a path that is written in `module` to the path from the root.
fn absolute(module: &ModulePath, path: &str) -> Option<ModulePath> {
    let path = path.split(' ').next().unwrap_or(path);
    let mut base = module.clone();
    for part in path.split("::") {
        match part {
            "crate" => base.clear(),
            "super" => drop(base.pop()?),
            "self" => {}
            // A child of the module or another crate: `resolve` tells them apart.
            name => base.push(name.to_owned()),
        }
    }
    Some(base)
}

/// Returns the module that defines what `path` leads to, through the imports on its way.
fn resolve(
    path: ModulePath,
    sources: &BTreeMap<ModulePath, (&String, String)>,
    imports: &HashMap<&ModulePath, HashMap<String, ModulePath>>,
    depth: usize,
) -> ModulePath {
    let mut module = ModulePath::new();
    for name in path {
        let imported = imports.get(&module).and_then(|names| names.get(&name));
        module.push(name);
        if sources.contains_key(&module) {
            continue;
        }
        module.pop();
        return match imported {
            Some(target) if depth < 8 => resolve(target.clone(), sources, imports, depth + 1),
            _ => module,
        };
    }
    module
}

/// Returns the modules that `lib.rs` lists, and the module of each name that it re-exports.
fn read_lib(lib: &str) -> (Vec<String>, HashMap<String, String>) {
    let (mut order, mut exports) = (Vec::new(), HashMap::new());
    for item in without_comments(lib).split(';') {
        let words: Vec<_> = item.split_whitespace().collect();
        if let [.., "mod", name] = words[..] {
            order.push(name.to_owned());
        } else if let Some(at) = words.iter().position(|word| *word == "use") {
            for path in spell_out(&words[at + 1..].join(" ")) {
                let path = path
                    .trim_start_matches("crate::")
                    .trim_start_matches("self::");
                let name = path.rsplit([':', ' ']).next().unwrap_or(path);
                exports.insert(name.to_owned(), head(path).to_owned());
            }
        }
    }
    exports.remove("self");
    (order, exports)
}

/// Returns how many `super::` lead from a file to the root.
fn depth(file: &str) -> usize {
    file.split('/').count() - usize::from(file.ends_with("/mod.rs"))
}

/// Returns each name that `code` takes from the crate's root, and its position.
fn root_names(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    for root in ["crate::", &"super::".repeat(depth)] {
        for (at, _) in code.match_indices(root) {
            let inside = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            if !code[..at].ends_with(inside) {
                let tree = code[at + root.len()..].trim_start();
                let tree = if tree.starts_with('{') {
                    block(tree)
                } else {
                    head(tree)
                };
                names.extend(
                    spell_out(tree)
                        .iter()
                        .map(|path| (at, head(path).to_owned())),
                );
            }
        }
    }
    names.sort();
    names.dedup();
    names
}

/// Returns the identifier at the start of `path`.
fn head(path: &str) -> &str {
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
    &path[..end.unwrap_or(path.len())]
}

/// Returns the content of the braces at the start of `text`, or its first character if there are
/// none.
fn block(text: &str) -> &str {
    let mut open = 0;
    let end = text.find(|c| {
        open += i32::from(c == '{') - i32::from(c == '}');
        open == 0
    });
    &text[..end.map_or(text.len(), |end| end + 1)]
}

/// Expands a tree of paths: `a::{b, c::{d}}` is `a::b` and `a::c::d`.
fn spell_out(tree: &str) -> Vec<String> {
    let Some(open) = tree.find('{') else {
        return vec![tree.trim().to_owned()];
    };
    let (prefix, braces) = (tree[..open].trim(), block(&tree[open..]));
    let mut level = 0;
    braces[1..braces.len() - 1]
        .split(|c| {
            level += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && level == 0
        })
        .filter(|branch| !branch.trim().is_empty())
        .flat_map(spell_out)
        .map(|path| format!("{prefix}{path}"))
        .collect()
}

/// Blanks the items under `#[cfg(test)]`, in code without comments or literals.
fn without_tests(mut code: String) -> String {
    let mark = "#[cfg(test)]";
    while let Some(start) = code.find(mark) {
        let rest = &code[start + mark.len()..];
        let body = rest.find(['{', ';']).unwrap_or(rest.len());
        let end = code.len() - rest.len() + body + block(&rest[body..]).len();
        code.replace_range(start..end, &blank(&code[start..end]));
    }
    code
}

/// Blanks comments and literals. Lines keep their numbers.
fn without_comments(source: &str) -> String {
    let (mut code, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(first) = rest.chars().next() {
        let skipped = comment_or_literal(rest);
        let (taken, left) = rest.split_at(skipped.max(first.len_utf8()));
        code += &if skipped > 0 {
            blank(taken)
        } else {
            taken.to_owned()
        };
        rest = left;
    }
    code
}

fn blank(text: &str) -> String {
    text.chars()
        .map(|c| if c == '\n' { c } else { ' ' })
        .collect()
}

/// Returns the length of the comment or literal at the start of `text`, or 0.
fn comment_or_literal(text: &str) -> usize {
    let through = |from: usize, mark: &str| {
        text[from..]
            .find(mark)
            .map_or(text.len(), |at| from + at + mark.len())
    };
    match text.as_bytes() {
        [b'/', b'/', ..] => text.find('\n').unwrap_or(text.len()),
        [b'/', b'*', ..] => {
            let mut at = 2;
            // Block comments nest.
            while !text[at..].starts_with("*/") && at < text.len() {
                let inner = if text[at..].starts_with("/*") {
                    comment_or_literal(&text[at..])
                } else {
                    0
                };
                at += inner.max(text[at..].chars().next().map_or(0, char::len_utf8));
            }
            text.len().min(at + 2)
        }
        [b'"', ..] => {
            let mut escaped = true; // as the opening quote does not close
            let end = text.bytes().position(|byte| {
                let closes = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                closes
            });
            end.map_or(text.len(), |end| end + 1)
        }
        [b'r', b'"' | b'#', ..] => {
            let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
            let raw = text[1 + hashes..].starts_with('"');
            if raw {
                through(2 + hashes, &format!("\"{}", "#".repeat(hashes)))
            } else {
                0
            }
        }
        [b'\'', b'\\', ..] => through(3, "'"),
        // A quote that is not closed after one character starts a lifetime.
        [b'\'', ..] => {
            let end = 1 + text[1..].chars().next().map_or(0, char::len_utf8);
            if text[end..].starts_with('\'') {
                end + 1
            } else {
                0
            }
        }
        _ => 0,
    }
}

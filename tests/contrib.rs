//! systemd and Kubernetes know every line of the files in `contrib`, and alerts and dashboard name
//! only metrics that exist. Without the programs of systemd and Kubernetes, the tests that need
//! them are skipped, except where `CI` is set.

#[path = "support/process.rs"]
mod process;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use process::installed;
use serde_json::Value;

const UNITS: [&str; 3] = ["lines.service", "lines.socket", "lines-admin.socket"];

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("contrib")
        .join(name);
    fs::read_to_string(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns what `systemd-analyze` says of the units, with `change` made to each.
fn verified(change: impl Fn(String) -> String) -> Output {
    let dir = tempfile::tempdir().expect("there is room for files");
    for unit in UNITS {
        // `systemd-analyze` checks that the program exists.
        let program = "ExecStart=/usr/local/bin/lines ";
        let content = file(&format!("systemd/{unit}")).replace(program, "ExecStart=/bin/true ");
        fs::write(dir.path().join(unit), change(content)).expect("there is room for a file");
    }
    let mut analyze = Command::new("systemd-analyze");
    analyze
        .args(["verify", "--man=no"])
        .args(UNITS)
        .current_dir(dir.path());
    // With their folder in the path, the units find each other.
    analyze.env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path().display()));
    analyze.output().expect("it runs")
}

#[test]
fn systemd_knows_every_line_of_the_units() {
    if !installed("systemd-analyze") {
        return;
    }
    let good = verified(|unit| unit);
    assert!(good.status.success(), "{good:?}");
    assert_eq!(text(&good.stderr), "");

    // A wrong name and a wrong value are reported.
    let bad = verified(|unit| unit.replace("WatchdogSec=", "WatchdockSec="));
    assert!(text(&bad.stderr).contains("WatchdockSec"), "{bad:?}");
    let bad = verified(|unit| unit.replace("Type=notify", "Type=notified"));
    assert!(text(&bad.stderr).contains("notified"), "{bad:?}");
}

#[test]
fn the_sockets_have_the_names_that_the_service_listens_on() {
    let service = file("systemd/lines.service");
    for (socket, flag) in [
        ("lines.socket", "--listen"),
        ("lines-admin.socket", "--admin"),
    ] {
        let socket = file(&format!("systemd/{socket}"));
        let name = socket
            .lines()
            .find_map(|line| line.strip_prefix("FileDescriptorName="));
        let name = name.expect("it has a name");
        assert!(
            service.contains(&format!("{flag} systemd:{name}")),
            "{name}"
        );
    }
}

/// Changes nothing, because the documents have this label.
const LABEL: [&str; 3] = ["label", "app=lines", "--overwrite"];

/// Passes a document to `kubectl`, which needs no cluster for it.
fn kubectl(args: &[&str], document: &str) -> Output {
    let mut kubectl = Command::new("kubectl");
    kubectl
        .args(args)
        .args(["--local", "-o", "json", "-f", "-"]);
    kubectl
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut kubectl = kubectl.spawn().expect("it runs");
    let mut stdin = kubectl.stdin.take().expect("a pipe");
    stdin.write_all(document.as_bytes()).expect("it reads");
    drop(stdin);
    kubectl.wait_with_output().expect("it ends")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|err| panic!("{err}: {output:?}"))
}

/// Returns the path of each field in `written` that is not in `known`.
fn unknown(written: &Value, known: &Value, path: &str, found: &mut Vec<String>) {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            for (name, value) in written {
                let path = format!("{path}.{name}");
                match known.get(name) {
                    Some(known) => unknown(value, known, &path, found),
                    None => found.push(path),
                }
            }
        }
        (Value::Array(written), Value::Array(known)) => {
            let pairs = written.iter().zip(known).enumerate();
            pairs.for_each(|(n, (a, b))| unknown(a, b, &format!("{path}.{n}"), found));
        }
        _ => {}
    }
}

/// Returns the fields of a deployment that Kubernetes does not know. Panics if a type is wrong.
fn unknown_in(deployment: &str) -> Vec<String> {
    // Only this command reads the document into Kubernetes' own types, which drops other fields.
    let typed = json(&kubectl(&["set", "env", "A=b"], deployment));
    let written = json(&kubectl(&LABEL, deployment));
    let mut found = Vec::new();
    unknown(&written, &typed, "", &mut found);
    found
}

#[test]
fn kubernetes_knows_every_field_of_the_manifests() {
    if !installed("kubectl") {
        return;
    }
    let manifests = file("kubernetes/lines.yaml");
    let [deployment, service] = manifests.split("---\n").collect::<Vec<_>>()[..] else {
        panic!("a deployment and a service");
    };
    assert_eq!(unknown_in(deployment), [""; 0]);
    assert_eq!(json(&kubectl(&LABEL, service))["kind"], "Service");

    // A misspelt field is found.
    let bad = deployment.replace("failureThreshold: 2", "failureTreshold: 2");
    let field = ".spec.template.spec.containers.0.readinessProbe.failureTreshold";
    assert_eq!(unknown_in(&bad), [field]);
}

/// Returns the series of each metric that the page of `observe` lists, under the names that a
/// recorder for Prometheus makes of them.
fn exported() -> Vec<BTreeSet<String>> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/observe/mod.rs");
    let page = fs::read_to_string(page).expect("the page is there");
    let rows = page.lines().filter_map(|line| {
        let row = line.strip_prefix("//! | `tower_tcp.")?;
        let (name, rest) = row.split_once("` | ")?;
        let (kind, unit) = rest.split(" |").next()?.split_once(", ")?;
        let unit = match unit {
            "bytes" | "seconds" => format!("_{unit}"),
            _ => String::new(),
        };
        let name = format!("tower_tcp_{}{unit}", name.replace('.', "_"));
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{name} is a {other}"),
        };
        let series = suffixes.iter().map(|suffix| format!("{name}{suffix}"));
        Some(series.collect())
    });
    rows.collect()
}

/// Returns the words with this start in a file.
fn words(content: &str, start: &str) -> BTreeSet<String> {
    content
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with(start))
        .map(str::to_owned)
        .collect()
}

#[test]
fn alerts_and_dashboard_name_only_metrics_that_exist() {
    let exported = exported();
    assert!(exported.len() > 10, "{exported:?}");
    for name in [
        "prometheus/alerts.yml",
        "prometheus/alerts_test.yml",
        "grafana/dashboard.json",
    ] {
        let named = words(&file(name), "tower_tcp_");
        let unknown: Vec<_> = named
            .iter()
            .filter(|named| !exported.iter().any(|series| series.contains(*named)))
            .collect();
        assert_eq!(unknown, [""; 0], "{name}");
        assert!(!named.is_empty(), "{name}");
    }
}

#[test]
fn the_dashboard_shows_each_metric() {
    let dashboard = file("grafana/dashboard.json");
    let parsed: Value = serde_json::from_str(&dashboard).expect("it is JSON");
    assert!(parsed["panels"].is_array());
    let shown = words(&dashboard, "tower_tcp_");
    for series in exported() {
        assert!(!series.is_disjoint(&shown), "{series:?}");
    }
}

#[test]
fn alerts_name_only_reasons_that_exist() {
    let reasons = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/end/reason.rs");
    let reasons = fs::read_to_string(reasons).expect("the reasons are there");
    let alerts = file("prometheus/alerts.yml");
    let mut checked = 0;
    for rest in alerts.split("close_reason").skip(1) {
        let Some((_, value)) = rest.split_once('"').filter(|(op, _)| op.len() < 3) else {
            continue;
        };
        let (values, _) = value.split_once('"').expect("it is closed");
        for reason in values.split('|') {
            assert!(reasons.contains(&format!("= \"{reason}\" by ")), "{reason}");
            checked += 1;
        }
    }
    assert!(checked > 5, "{checked}");
}

/// Runs the tests of the alerts by `promtool`, with `change` made to the alerts.
fn alerts_pass(change: impl Fn(String) -> String) -> Output {
    let dir = tempfile::tempdir().expect("there is room for files");
    for name in ["alerts.yml", "alerts_test.yml"] {
        let content = file(&format!("prometheus/{name}"));
        let content = if name == "alerts.yml" {
            change(content)
        } else {
            content
        };
        fs::write(dir.path().join(name), content).expect("there is room for a file");
    }
    let mut promtool = Command::new("promtool");
    promtool
        .args(["test", "rules", "alerts_test.yml"])
        .current_dir(dir.path());
    promtool.output().expect("it runs")
}

/// Skipped without `promtool` in CI, too, because its package of 19 MB is not installed there.
#[test]
fn each_alert_fires_on_its_fault_and_on_nothing_else() {
    if Command::new("promtool").arg("--version").output().is_err() {
        eprintln!("skipped: promtool is not installed (Debian: prometheus)");
        return;
    }
    let good = alerts_pass(|alerts| alerts);
    assert!(good.status.success(), "{good:?}");

    // With any of these changes, the tests of the alerts fail.
    for (is, other) in [
        ("> 0.9 *", "> 0.7 *"),
        ("> 16\n        for: 1m", "> 16"),
        ("slow_reader|", ""),
        ("tls_handshake_failed|canceled", ".+"),
        ("{close_reason!=\"denied\"}", ""),
        ("action=\"stop\"", "action=\"stopped\""),
    ] {
        let bad = alerts_pass(|alerts| alerts.replace(is, other));
        assert!(!bad.status.success(), "{other}: {bad:?}");
    }
}

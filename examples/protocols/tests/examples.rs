//! Every example of this package has a file of tests, and explains its options.

use std::path::Path;

#[path = "../../../tests/support/process.rs"]
mod process;

const ALL: [&str; 3] = ["memcached", "mqtt", "rpc"];

/// Returns the names of the Rust files in a folder, in order.
fn names(dir: &Path) -> Vec<String> {
    let dir = std::fs::read_dir(dir).expect("it can be read");
    let mut names: Vec<_> = dir
        .map(|entry| entry.expect("it can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

#[test]
fn every_example_has_a_file_of_tests() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(names(package), ALL);

    let tests = names(&package.join("tests"));
    for name in ALL {
        assert!(tests.iter().any(|test| test == name), "{name}");
    }
}

#[tokio::test]
async fn every_example_explains_its_options() {
    for name in ALL {
        process::explains_its_options(name).await;
    }
}

#!/usr/bin/env bash
# tower: `AsyncFilter::layer(predicate)` does not return the layer of an `AsyncFilter`. It returns a
# `FilterLayer`, the layer of the synchronous `Filter`, which is a service only if the predicate is a
# synchronous one. So a program that builds its layer in this way compiles up to the point where the
# service is called. `AsyncFilterLayer::new(predicate)`, or `ServiceBuilder::filter_async`, returns
# the right one.
#
# Seen with tower 0.4.13 and 0.5.3.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >src/main.rs <<'RUST'
use std::any::type_name_of_val;
use std::convert::Infallible;

use tower::filter::{AsyncFilter, AsyncFilterLayer};
use tower::{BoxError, Layer, ServiceExt, service_fn};

async fn even(n: u32) -> Result<u32, BoxError> {
    if n % 2 == 0 { Ok(n) } else { Err("an odd number".into()) }
}

/// Returns the name of a type without the paths and the parameters.
fn name<T>(value: &T) -> &str {
    let name = type_name_of_val(value).split('<').next().unwrap();
    name.rsplit("::").next().unwrap()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let echo = service_fn(|n: u32| async move { Ok::<_, Infallible>(n) });

    let layer = AsyncFilter::<(), _>::layer(even);
    println!("AsyncFilter::layer: {}, service: {}", name(&layer), name(&layer.layer(echo)));

    let layer = AsyncFilterLayer::new(even);
    println!("AsyncFilterLayer::new: {}, service: {}", name(&layer), name(&layer.layer(echo)));
    println!("{:?}", layer.layer(echo).oneshot(2).await);
}
RUST

cat >expected <<'TEXT'
AsyncFilter::layer: FilterLayer, service: Filter
AsyncFilterLayer::new: AsyncFilterLayer, service: AsyncFilter
Ok(2)
TEXT

for version in 0.4.13 0.5.3; do
    cat >Cargo.toml <<TOML
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
tokio = { version = "1", features = ["macros", "rt"] }
tower = { version = "=$version", features = ["filter", "util"] }
TOML
    echo "tower $version"
    cargo run --quiet >seen
    cat seen
    diff expected seen
done

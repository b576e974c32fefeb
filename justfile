# Formatting and lints.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --all-features -- -D warnings

test:
    cargo test

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

# What the main modules cost, beside a baseline: `just bench dispatch` for one.
bench *filter:
    cargo bench --package rooms -- {{filter}}

# The examples beside servers that one would write instead: `just peers all`, or one of the tables.
peers *args:
    cargo run --release --package peers -- {{args}}

# Licences, duplicates, sources (needs cargo-deny).
deny:
    cargo deny --all-features check

# What CI runs.
ci:
    bash .ci/run

#!/usr/bin/env bash
# In MQTT 3.1.1 a SUBACK tells for each filter the QoS that is granted, 0 to 2, or 0x80 for a filter
# that is refused (section 3.9.3; all other codes are reserved). The crate mqtt-proto has all four
# as an enum and reads 0x80 rightly, but it writes a refusal as 3, the number of the variant. Its
# own decoder returns an error for that packet. So a server cannot refuse one filter of several with
# it, unless it corrects the byte.
#
# Seen with mqtt-proto 0.4.0. Needs cargo.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "suback"
version = "0.0.0"
edition = "2021"

[dependencies]
mqtt-proto = "=0.4.0"
TOML
cat >src/main.rs <<'RUST'
use mqtt_proto::v3::{Packet, Suback, SubscribeReturnCode};
use mqtt_proto::Pid;

fn main() {
    let codes = vec![SubscribeReturnCode::MaxLevel1, SubscribeReturnCode::Failure];
    let packet = Packet::Suback(Suback::new(Pid::default(), codes));
    let bytes = packet.encode().unwrap();
    println!("written: {:02x?}", bytes.as_ref());
    println!("read again: {:?}", Packet::decode(bytes.as_ref()));
    assert_eq!(bytes.as_ref(), [0x90, 4, 0, 1, 1, 3], "0x80 would be right");
    assert!(Packet::decode(bytes.as_ref()).is_err());

    let right = [0x90, 4, 0, 1, 1, 0x80];
    println!("what the standard says, read: {:?}", Packet::decode(&right));
    assert_eq!(Packet::decode(&right).unwrap(), Some(packet));
}
RUST
cargo run --quiet

//! `pipeline`: requests to a service and back, in each way of dispatch.

use divan::Bencher;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::frame::Lines;

use crate::support::{Client, Load, by_hand, echo, line, line_of, serve};

#[derive(Clone, Copy, Debug)]
enum Way {
    ByHand,
    OneAtATime,
    InFlight64,
    Multiplexed64,
}

const WAYS: [Way; 4] = [
    Way::ByHand,
    Way::OneAtATime,
    Way::InFlight64,
    Way::Multiplexed64,
];

#[divan::bench(consts = [1, 16, 128], args = WAYS)]
fn lines_of_16_ahead<const AHEAD: usize>(bencher: Bencher, way: Way) {
    requests(bencher, way, &Load::new(&line_of(16), AHEAD));
}

#[divan::bench(consts = [1, 16, 128], args = WAYS)]
fn lines_of_1024_ahead<const AHEAD: usize>(bencher: Bencher, way: Way) {
    requests(bencher, way, &Load::new(&line_of(1024), AHEAD));
}

fn requests(bencher: Bencher, way: Way, load: &Load) {
    let pipeline = || Pipeline::new(Lines::default).service(service_fn(echo));
    let client = match way {
        Way::ByHand => Client::of(|stream| by_hand(stream, line)),
        Way::OneAtATime => Client::of_server(|| serve(pipeline())),
        Way::InFlight64 => Client::of_server(|| serve(pipeline().in_flight(64))),
        Way::Multiplexed64 => Client::of_server(|| serve(pipeline().multiplexed(64))),
    };
    client.bench(bencher, load);
}

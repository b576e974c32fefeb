//! A recorder for the facade `metrics`. The one of `metrics-util` depends on a dozen crates, and
//! every example would compile them.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use metrics::{
    Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Default)]
struct Values(Mutex<Vec<f64>>);

impl HistogramFn for Values {
    fn record(&self, value: f64) {
        self.0.lock().expect("no test panics under it").push(value);
    }
}

#[derive(Clone)]
enum Cell {
    Counter(Arc<AtomicU64>),
    Gauge(Arc<AtomicU64>),
    Histogram(Arc<Values>),
}

/// Records the metrics of this thread while [`metrics::set_default_local_recorder`] has it
/// installed.
#[derive(Default)]
pub(crate) struct Recorded {
    cells: Mutex<BTreeMap<Key, Cell>>,
    described: Mutex<BTreeMap<String, (Kind, Option<Unit>)>>,
}

/// One series.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) attributes: BTreeMap<String, String>,
    /// The value of a counter or gauge, or the sum of a histogram.
    pub(crate) value: f64,
    /// The number of values that a histogram has recorded.
    pub(crate) times: usize,
}

impl Recorded {
    /// Returns the series of a metric, or of all metrics, that have these attributes.
    pub(crate) fn series(&self, name: Option<&str>, attributes: &[(&str, &str)]) -> Vec<Series> {
        let cells = self.cells.lock().expect("no test panics under it");
        let series = cells.iter().map(|(key, cell)| Series::new(key, cell));
        series
            .filter(|series| name.is_none_or(|name| series.name == name))
            .filter(|series| {
                let mut wanted = attributes.iter();
                wanted.all(|(key, value)| series.attributes.get(*key).is_some_and(|is| is == value))
            })
            .collect()
    }

    /// Returns the sum over all series of the metric that have these attributes.
    pub(crate) fn sum(&self, name: &str, attributes: &[(&str, &str)]) -> f64 {
        let series = self.series(Some(name), attributes);
        series.iter().map(|series| series.value).sum()
    }

    /// Returns how many values the histogram's series with these attributes have recorded.
    pub(crate) fn times(&self, name: &str, attributes: &[(&str, &str)]) -> usize {
        let series = self.series(Some(name), attributes);
        series.iter().map(|series| series.times).sum()
    }

    /// Returns the kind and unit of each described metric, by name.
    pub(crate) fn described(&self) -> BTreeMap<String, (Kind, Option<Unit>)> {
        self.described
            .lock()
            .expect("no test panics under it")
            .clone()
    }

    fn describe(&self, name: &KeyName, kind: Kind, unit: Option<Unit>) {
        self.described
            .lock()
            .expect("no test panics under it")
            .insert(name.as_str().to_owned(), (kind, unit));
    }

    fn cell(&self, key: &Key, new: impl FnOnce() -> Cell) -> Cell {
        let mut cells = self.cells.lock().expect("no test panics under it");
        cells.entry(key.clone()).or_insert_with(new).clone()
    }
}

impl Series {
    fn new(key: &Key, cell: &Cell) -> Self {
        let (kind, value, times) = match cell {
            #[expect(clippy::cast_precision_loss, reason = "tests count less")]
            Cell::Counter(count) => (Kind::Counter, count.load(Ordering::SeqCst) as f64, 0),
            Cell::Gauge(level) => (Kind::Gauge, f64::from_bits(level.load(Ordering::SeqCst)), 0),
            Cell::Histogram(values) => {
                let values = values.0.lock().expect("no test panics under it");
                (Kind::Histogram, values.iter().sum(), values.len())
            }
        };
        let attributes = key
            .labels()
            .map(|label| (label.key().to_owned(), label.value().to_owned()));
        Self {
            name: key.name().to_owned(),
            kind,
            attributes: attributes.collect(),
            value,
            times,
        }
    }
}

impl Recorder for Recorded {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, Kind::Counter, unit);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, Kind::Gauge, unit);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.describe(&name, Kind::Histogram, unit);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        match self.cell(key, || Cell::Counter(Arc::default())) {
            Cell::Counter(count) => Counter::from_arc(count),
            _ => panic!("{key} is two things"),
        }
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        match self.cell(key, || Cell::Gauge(Arc::default())) {
            Cell::Gauge(level) => Gauge::from_arc(level),
            _ => panic!("{key} is two things"),
        }
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        match self.cell(key, || Cell::Histogram(Arc::default())) {
            Cell::Histogram(values) => Histogram::from_arc(values),
            _ => panic!("{key} is two things"),
        }
    }
}

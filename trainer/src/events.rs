//! TensorBoard's event files: a sequence of framed protobuf messages, of which a folder may hold several.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::{Error, Result};

/// By which TensorBoard knows them.
const PREFIX: &str = "events.out.tfevents.";
/// What PyTorch's writer calls itself, too: steps that are taken again replace those from before.
const VERSION: &str = "brain.Event:2";
/// A run goes on: what earlier files say about this step and later ones is void.
const START: i32 = 1;

/// `tensorflow.Event`: its fields are those of one event, of which one of the last three is set.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<SummaryValue>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "5")]
    histogram: Option<Histogram>,
}

/// `tensorflow.HistogramProto`.
#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    count: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_of_squares: f64,
    /// Upper ends of the buckets.
    #[prost(double, repeated, tag = "6")]
    limits: Vec<f64>,
    /// Values in the buckets.
    #[prost(double, repeated, tag = "7")]
    buckets: Vec<f64>,
}

/// `tensorflow.SessionLog`.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A file of events that is being written.
#[derive(Debug)]
pub(crate) struct Events {
    path: PathBuf,
    file: fs::File,
}

impl Events {
    /// Begins a file. If the folder holds some already, what they say about steps after `step` is void.
    pub(crate) fn create(folder: &Path, step: u64) -> Result<Self> {
        let earlier = files(folder)?.len();
        // TensorBoard reads them in the order of their names.
        let path = folder.join(format!("{PREFIX}{:010}.plumb.{}.{earlier}", now() as u64, std::process::id()));
        let file = fs::File::create(&path).map_err(Error::io(&path))?;
        let mut events = Self { path, file };
        events.write(Event { file_version: Some(VERSION.to_owned()), ..Event::default() })?;
        if earlier > 0 {
            let session_log = Some(SessionLog { status: START });
            events.write(Event { step: step as i64 + 1, session_log, ..Event::default() })?;
        }
        Ok(events)
    }

    /// Numbers by their tags, such as `train/loss`.
    pub(crate) fn scalars(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        let value = |(tag, value): &(String, f64)| SummaryValue {
            tag: tag.clone(),
            simple_value: Some(*value as f32),
            histogram: None,
        };
        self.summary(step, scalars.iter().map(value).collect())
    }

    /// How values are spread.
    pub(crate) fn histogram(&mut self, step: u64, tag: &str, values: &[f64]) -> Result<()> {
        let histogram = Histogram::of(values);
        self.summary(step, vec![SummaryValue { tag: tag.to_owned(), simple_value: None, histogram }])
    }

    fn summary(&mut self, step: u64, values: Vec<SummaryValue>) -> Result<()> {
        self.write(Event { step: step as i64, summary: Some(Summary { values }), ..Event::default() })
    }

    /// Appends an event with the time, in one piece: whoever follows the file meets half of one at its end only.
    fn write(&mut self, event: Event) -> Result<()> {
        let record = frame(&Event { wall_time: now(), ..event }.encode_to_vec());
        self.file.write_all(&record).map_err(Error::io(&self.path))
    }
}

impl Histogram {
    /// In thirty buckets of the same width; `None` of no finite values.
    fn of(values: &[f64]) -> Option<Self> {
        const BUCKETS: usize = 30;
        let values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        let min = values.iter().copied().reduce(f64::min)?;
        let max = values.iter().copied().fold(min, f64::max);
        let width = if max > min { (max - min) / BUCKETS as f64 } else { 1.0 };
        let mut buckets = vec![0.0; BUCKETS];
        for value in &values {
            buckets[(((value - min) / width) as usize).min(BUCKETS - 1)] += 1.0;
        }
        Some(Self {
            min,
            max,
            count: values.len() as f64,
            sum: values.iter().sum(),
            sum_of_squares: values.iter().map(|value| value * value).sum(),
            limits: (1..=BUCKETS).map(|end| min + end as f64 * width).collect(),
            buckets,
        })
    }
}

/// Event files of a folder, by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A record of a TFRecord file: its length, the length's checksum, itself, and its checksum.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), data, &masked(data).to_le_bytes()].concat()
}

/// CRC-32C, turned and moved, so that data that holds checksums of its own is safe too.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the framing of a file and takes its events apart.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(12);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
            assert_eq!(number(&head[8..]), masked(&head[..8]));
            assert_eq!(number(&tail[length..length + 4]), masked(&tail[..length]));
            events.push(Event::decode(&tail[..length]).unwrap());
            rest = &tail[length + 4..];
        }
        events
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4, and the mask by hand: (0x8a9136aa >> 15 | 0x8a9136aa << 17) + 0xa282ead8.
        for (data, crc) in [(vec![0; 32], 0x8a91_36aa), (vec![0xff; 32], 0x62a8_ab43), ((0..32).collect(), 0x46dd_794e)]
        {
            assert_eq!(crc32c::crc32c(&data), crc);
        }
        assert_eq!(masked(&[0; 32]), 0x0fd7_fffa);
    }

    #[test]
    fn a_record_is_the_one_that_tensorboard_writes() {
        let event = Event { wall_time: 1.6e9, file_version: Some(VERSION.to_owned()), ..Event::default() };
        // By RecordWriter and event_pb2 of tensorboard 2.21.
        let theirs = "1800000000000000a37f4b22090000000084d7d7411a0d627261696e2e4576656e743a32253c71d0";
        assert_eq!(hex::encode(frame(&event.encode_to_vec())), theirs);
    }

    #[test]
    fn numbers_and_histograms_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::create(folder.path(), 0).unwrap();
        events.scalars(7, &[("train/loss".to_owned(), 0.5), ("train/lr".to_owned(), 1e-5)]).unwrap();
        events.histogram(8, "dev/reward/chosen", &[-1.0, 2.0, 2.0, f64::NAN]).unwrap();
        events.histogram(8, "dev/reward/rejected", &[3.0]).unwrap();
        let [version, scalars, chosen, rejected] = read(&events.path).try_into().unwrap();
        assert_eq!((version.file_version.as_deref(), version.step), (Some("brain.Event:2"), 0));
        assert!(version.wall_time > 1.7e9);
        let values = scalars.summary.unwrap().values;
        let found: Vec<_> = values.iter().map(|value| (&value.tag[..], value.simple_value)).collect();
        assert_eq!((scalars.step, found), (7, vec![("train/loss", Some(0.5)), ("train/lr", Some(1e-5))]));
        let histogram = chosen.summary.unwrap().values.remove(0).histogram.unwrap();
        assert_eq!((histogram.min, histogram.max, histogram.count), (-1.0, 2.0, 3.0));
        assert_eq!((histogram.sum, histogram.sum_of_squares), (3.0, 9.0));
        assert_eq!((histogram.buckets[0], histogram.buckets[29], histogram.limits[29]), (1.0, 2.0, 2.0));
        assert_eq!(rejected.summary.unwrap().values.remove(0).histogram.unwrap().buckets[0], 1.0);
    }

    #[test]
    fn a_second_file_makes_later_steps_of_the_first_void() {
        let folder = tempfile::tempdir().unwrap();
        for after in [0, 20] {
            Events::create(folder.path(), after)
                .unwrap()
                .scalars(after + 1, &[("train/loss".to_owned(), 1.0)])
                .unwrap();
        }
        let [first, second] = files(folder.path()).unwrap().try_into().unwrap();
        assert_eq!(read(&first).len(), 2);
        let [version, start, loss] = read(&second).try_into().unwrap();
        assert!(version.file_version.is_some() && loss.step == 21);
        assert_eq!((start.step, start.session_log), (21, Some(SessionLog { status: 1 })));
    }
}

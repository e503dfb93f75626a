//! Which calls are recorded, where not all are.

use plumb_proto::record::Record;
use sha2::{Digest as _, Sha256};

/// Whether a call belongs to the sample.
///
/// The texts decide, not chance: the same items, or the same prompt with the same candidates, are in the sample of every
/// server, version and day, so that two recordings hold the same calls. They are in a share p if the first 8 bytes of the
/// SHA-256 of their JSON, as a big-endian number, are below p times 2 to the power of 64. That JSON is the record's `items`,
/// or its `prompt` followed by its `candidates`.
pub(super) fn is_chosen(record: &Record, share: f64) -> bool {
    if share >= 1.0 {
        return true;
    }
    let mut hash = Sha256::new();
    // Hashing does not fail, and what was decoded can be encoded.
    if let Some(score) = &record.score {
        let _ = serde_json::to_writer(&mut hash, &score.items);
    }
    if let Some(rank) = &record.rank {
        let _ = serde_json::to_writer(&mut hash, &rank.prompt);
        let _ = serde_json::to_writer(&mut hash, &rank.candidates);
    }
    let first = hash.finalize().iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
    (first as f64) < share * 2f64.powi(64)
}

#[cfg(test)]
mod tests {
    use plumb_proto::v1;

    use super::*;

    fn score(text: &str, change: impl FnOnce(&mut v1::ScoreRequest)) -> Record {
        let items = vec![v1::Input { input: Some(v1::input::Input::Text(text.to_owned())) }];
        let mut request = v1::ScoreRequest { items, ..Default::default() };
        change(&mut request);
        Record { score: Some(request), ..Record::default() }
    }

    #[test]
    fn a_share_of_the_texts_is_chosen() {
        for share in [0.01, 0.3, 0.9] {
            let chosen = (0..4000).filter(|i| is_chosen(&score(&i.to_string(), |_| {}), share)).count();
            let found = chosen as f64 / 4000.0;
            // Four standard deviations, for a fixed set of texts.
            assert!((found - share).abs() < 4.0 * (share * (1.0 - share) / 4000.0).sqrt(), "{share} gives {found}");
        }
        assert!(is_chosen(&score("a", |_| {}), 1.0));
        assert!(!is_chosen(&score("a", |_| {}), 0.0));
    }

    #[test]
    fn a_smaller_sample_is_part_of_a_larger_one_and_only_the_texts_decide() {
        for i in 0..500 {
            let text = i.to_string();
            let small = is_chosen(&score(&text, |_| {}), 0.1);
            let other = score(&text, |request| {
                request.request_id = "another".to_owned();
                request.model = Some(v1::ModelSpec::default());
                request.priority = 3;
            });
            assert_eq!(is_chosen(&other, 0.1), small);
            assert!(!small || is_chosen(&other, 0.2));
        }
    }

    #[test]
    fn the_hash_is_the_one_that_is_documented() {
        // sha256('[{"text":"a"}]') begins with this number.
        let first = u64::from_be_bytes(Sha256::digest(br#"[{"text":"a"}]"#)[..8].try_into().unwrap());
        let share = first as f64 / 2f64.powi(64);
        assert!(!is_chosen(&score("a", |_| {}), share) && is_chosen(&score("a", |_| {}), share * 1.000_001));
    }
}

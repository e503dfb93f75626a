//! Stop strings: text is held back while it may be the beginning of one.

/// Looks for stop strings in a text that comes in pieces.
#[derive(Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, where a stop string may have begun.
    held: String,
}

/// What a piece of text turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Released {
    /// Text that is certainly not part of a stop string.
    pub(super) text: String,
    /// Whether a stop string followed it.
    pub(super) stopped: bool,
}

impl StopStrings {
    /// Looks for these; none may be empty.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. After a stop there is no more to come.
    pub(super) fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        // Of several, the earliest one counts.
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Released { text, stopped: true };
        }
        let held_from = self.stops.iter().map(|stop| begins_at(&self.held, stop)).min().unwrap_or(self.held.len());
        let rest = self.held.split_off(held_from);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// What is still held, once no more text follows.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where the longest end of `text` begins that is a beginning of `stop`; the length of `text` if there is none.
fn begins_at(text: &str, stop: &str) -> usize {
    let longest = stop.len().saturating_sub(1).min(text.len());
    let starts = text.char_indices().map(|(at, _)| at).filter(|at| *at >= text.len() - longest);
    starts.into_iter().find(|at| stop.starts_with(&text[*at..])).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(stops: &[&str], pieces: &[&str], expected: &[&str], stopped: bool) {
        let mut holder = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut released = Vec::new();
        let mut has_stopped = false;
        for piece in pieces {
            let Released { text, stopped } = holder.push(piece);
            released.push(text);
            has_stopped = stopped;
            if stopped {
                break;
            }
        }
        if !has_stopped {
            released.push(holder.finish());
        }
        assert_eq!((released, has_stopped), (expected.iter().map(|text| (*text).to_owned()).collect(), stopped));
    }

    #[test]
    fn text_is_held_while_it_may_begin_a_stop_string() {
        check(&[], &["ab", "c"], &["ab", "c", ""], false);
        check(&["\n\nHuman:"], &["Yes.", "\n", "\nHu", "man:", "x"], &["Yes.", "", "", ""], true);
        check(&["\n\nHuman:"], &["Yes.\n\nHum", "our"], &["Yes.", "\n\nHumour", ""], false);
        check(&["\n\nHuman:"], &["Yes.\n\nHum"], &["Yes.", "\n\nHum"], false);
        check(&["STOP"], &["a STOP b"], &["a "], true);
        check(&["aab"], &["aaa", "b"], &["a", ""], true);
        check(&["bb", "abc"], &["a", "b", "c"], &["", "", ""], true);
        check(&["cd", "bcd"], &["ab", "cd"], &["a", ""], true);
        check(&["é!"], &["caf", "é", "."], &["caf", "", "é.", ""], false);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(text in "[ab]{0,24}", stop in "[ab]{1,4}", cuts in prop::collection::vec(0usize..24, 0..6)) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let mut holder = StopStrings::new(vec![stop.clone()]);
            let mut released = String::new();
            let mut stopped = false;
            for cut in cuts.windows(2) {
                let piece = holder.push(&text[cut[0]..cut[1]]);
                released.push_str(&piece.text);
                stopped = piece.stopped;
                if stopped {
                    break;
                }
            }
            released.push_str(&holder.finish());
            prop_assert_eq!(stopped, text.contains(&stop));
            prop_assert_eq!(released, text.split(&stop).next().unwrap());
        }
    }
}

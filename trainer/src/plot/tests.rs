use super::*;

/// Attributes of all elements of a name, as one finds them in a text that is well-formed.
fn elements(svg: &str, name: &str) -> Vec<Vec<(String, String)>> {
    let mut reader = quick_xml::Reader::from_str(svg);
    let mut found = Vec::new();
    loop {
        match reader.read_event().unwrap() {
            quick_xml::events::Event::Eof => return found,
            quick_xml::events::Event::Start(tag) | quick_xml::events::Event::Empty(tag)
                if tag.name().as_ref() == name.as_bytes() =>
            {
                let attribute = |a: quick_xml::events::attributes::Attribute<'_>| {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    (text(a.key.as_ref()), text(&a.value))
                };
                found.push(tag.attributes().map(|a| attribute(a.unwrap())).collect());
            }
            _ => {}
        }
    }
}

const LABELS: Labels<'static> = Labels { title: "Loss & <more>", x: "step", y: "loss (nats)" };

fn count(svg: &str, name: &str) -> usize {
    elements(svg, name).len()
}

/// All texts, escapes resolved.
fn texts(svg: &str) -> String {
    let inner = svg.split('<').filter_map(|part| Some(part.split_once('>')?.1.trim()));
    inner.map(|text| html_escape::decode_html_entities(text).into_owned()).collect::<Vec<_>>().join("|")
}

/// The centre of a circle.
fn centres(svg: &str) -> Vec<(f64, f64)> {
    let number = |attributes: &[(String, String)], name: &str| {
        attributes.iter().find(|(key, _)| key == name).unwrap().1.parse::<f64>().unwrap()
    };
    elements(svg, "circle").iter().map(|circle| (number(circle, "cx"), number(circle, "cy"))).collect()
}

#[test]
fn curves_show_their_points_names_and_intervals() {
    let mut train = Series::new("train <b>", [(1.0, 0.7), (10.0, 0.6), (100.0, 0.5), (0.0, 0.4), (7.0, f64::NAN)]);
    train.behind = (1..100).map(|i| (f64::from(i), 0.6)).collect();
    let mut dev = Series::new("dev", [(1.0, 0.8), (100.0, 0.7)]);
    dev.points.iter_mut().for_each(|point| point.y.interval = Some((point.y.value - 0.1, point.y.value + 0.1)));
    let svg = lines(&LABELS, true, &[train.clone(), dev.clone()]).unwrap();
    for text in ["Loss & <more>", "step", "loss (nats)", "train <b>", "dev", "100"] {
        assert!(texts(&svg).contains(text), "{text}: {}", texts(&svg));
    }
    // What is not a number, and what has no logarithm, has no place.
    let points = centres(&svg);
    assert_eq!(points.len(), 5);
    let steps: Vec<f64> = points[..3].windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(steps[0] > 100.0 && (steps[0] - steps[1]).abs() <= 1.0, "a decade is as wide as another: {points:?}");

    let bars = count(&svg, "polyline");
    dev.band = true;
    let svg = lines(&LABELS, true, &[train, dev]).unwrap();
    assert_eq!((count(&svg, "polygon"), bars - count(&svg, "polyline")), (1, 2));
}

#[test]
fn a_long_curve_keeps_its_extremes() {
    let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), 0.5)).collect();
    points[77_777].1 = 9.0;
    points[77_778].1 = -9.0;
    let thin = thinned(points.clone());
    assert!(thin.len() <= DRAWN && thin.is_sorted_by(|a, b| a.0 <= b.0), "{}", thin.len());
    assert!(thin.contains(&points[77_777]) && thin.contains(&points[77_778]));
    let svg = lines(&LABELS, false, &[Series::new("", points)]).unwrap();
    assert!(svg.len() < 100_000 && count(&svg, "circle") == 0, "{}", svg.len());
}

#[test]
fn histograms_have_the_height_of_their_shares() {
    let (low, high) = ([0.0; 10], [1.0; 30]);
    let bars = |svg: &str| -> Vec<f64> {
        let value = |bar: &[(String, String)], name: &str| {
            bar.iter().find(|(key, _)| key == name).map(|(_, value)| value.parse::<f64>().unwrap_or(0.0))
        };
        let bars = elements(svg, "rect").into_iter().filter(|bar| value(bar, "opacity") == Some(0.35));
        bars.map(|bar| value(&bar, "height").unwrap()).collect()
    };
    let one = bars(&histograms(&LABELS, &[("chosen", &high), ("rejected", &low)]).unwrap());
    assert!(one.len() == 2 && (one[0] - one[1]).abs() <= 1.0, "all of each set is in one bin: {one:?}");
    let half = [low.as_slice(), &high[..10], &[f64::NAN]].concat();
    assert_eq!(bars(&histograms(&LABELS, &[("rewards", &half)]).unwrap()).len(), 2);
    assert_eq!(bars(&histograms(&LABELS, &[("all the same", &high)]).unwrap()).len(), 1);
}

#[test]
fn categories_go_from_top_to_bottom() {
    let names = ["helpful", "honest"].map(str::to_owned);
    let estimate = |value| Some(Estimate { value, interval: Some((value - 0.1, value + 0.1)) });
    let groups = [
        Group { name: "no prompt".into(), values: vec![estimate(0.6), estimate(0.7)] },
        Group { name: "HHH prompt".into(), values: vec![None, estimate(0.9)] },
    ];
    let svg = categories(&Labels { y: "", ..LABELS }, &names, &groups, Some(0.5)).unwrap();
    // Two in the legend, then the groups.
    let [_, _, first, second, third] = centres(&svg)[..] else { unreachable!() };
    assert!(first.0 < second.0 && second.0 < third.0, "{first:?} {second:?} {third:?}");
    assert!(first.1 < second.1 && second.1 < third.1, "{first:?} {second:?} {third:?}");
    assert!(["helpful", "honest", "no prompt", "HHH prompt"].iter().all(|text| texts(&svg).contains(text)));
}

#[test]
fn what_is_predicted_right_lies_on_the_diagonal() {
    let bin = |p: f64, count| Bin { predicted: p, observed: Estimate { value: p, interval: None }, count };
    let svg = calibration("Calibration", &[bin(0.0, 4), bin(0.5, 0), bin(1.0, 16)]).unwrap();
    let circles = elements(&svg, "circle");
    // The first is the legend's.
    let radius = circles[1..].iter().flatten().filter(|(key, _)| key == "r").map(|(_, value)| value.as_str());
    assert_eq!(radius.collect::<Vec<_>>(), ["8", "16"], "the area goes with the count");
    let (first, last) = (centres(&svg)[1], centres(&svg)[2]);
    let ends = format!("{},{} {},{}", first.0, first.1, last.0, last.1);
    let mut drawn = elements(&svg, "polyline").into_iter().flatten();
    assert!(drawn.any(|(key, points)| key == "points" && points.trim() == ends), "{ends} {svg}");
}

#[test]
fn no_number_is_too_large_or_too_close_to_another() {
    let cases = [
        [1.0, 1.0],
        [0.0, 5e-324],
        [-5e-324, 5e-324],
        [1.0, 1.0 + f64::EPSILON],
        [f64::MAX, f64::MIN],
        [1e299, -1e299],
    ];
    for [a, b] in cases {
        for log_x in [false, true] {
            let series = Series::new("train", [(a, b), (b, a), (1.0, 2.0)]);
            assert!(lines(&LABELS, log_x, &[series]).unwrap().contains("polyline"), "{a} {b}");
        }
        histograms(&LABELS, &[("chosen", &[a, b])]).unwrap();
    }
}

#[test]
fn no_data_is_said() {
    let none = lines(&LABELS, false, &[Series::new("train", [(f64::NAN, 1.0)])]).unwrap();
    let nothing = [histograms(&LABELS, &[]), categories(&LABELS, &[], &[], None)].map(Result::unwrap);
    assert!([none].iter().chain(&nothing).all(|svg| texts(svg).contains("no data")));
}

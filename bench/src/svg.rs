//! The picture: for each row of the table a group of bars, one for each contestant, scaled to the
//! group's longest.

use crate::report::{Better, Results, Row, number};

const LABELS: f64 = 330.0;
const BARS: f64 = 420.0;
const WIDTH: f64 = 900.0;
const BAR: f64 = 12.0;
const GAP: f64 = 12.0;
/// Distinguishable for colour-blind readers.
const COLOURS: [&str; 3] = ["#888888", "#0072b2", "#e69f00"];

/// Draws the picture.
pub fn draw(results: &Results) -> String {
    let mut body = String::new();
    let mut y = 64.0;
    for row in results
        .rows
        .iter()
        .filter(|row| row.median(0).is_some() || row.median(1).is_some())
    {
        y = group(row, results, y, &mut body);
    }
    let mut head = format!(
        "<text x=\"20\" y=\"26\" font-size=\"16\" font-weight=\"bold\">hull beside runc, {}</text>\n",
        escape(&results.date)
    );
    let mut x = 20.0;
    for (name, colour) in results.contestants.iter().zip(COLOURS) {
        head.push_str(&format!(
            "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"48\">{}</text>\n",
            x + 18.0,
            escape(name)
        ));
        x += 110.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{0}\" viewBox=\"0 0 {WIDTH} {0}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{head}{body}</svg>\n",
        y + 10.0
    )
}

fn group(row: &Row, results: &Results, top: f64, body: &mut String) -> f64 {
    let medians: Vec<Option<f64>> = (0..results.contestants.len())
        .map(|column| row.median(column))
        .collect();
    let longest = medians
        .iter()
        .flatten()
        .copied()
        .fold(f64::MIN_POSITIVE, f64::max);
    let better = match row.better {
        Better::Lower => "less is better",
        Better::Higher => "more is better",
    };
    body.push_str(&format!(
        "<text x=\"20\" y=\"{:.0}\">{}<tspan fill=\"#777777\" font-size=\"10\"> · {better}</tspan></text>\n",
        top + BAR,
        escape(&row.name)
    ));
    let mut y = top;
    for ((column, median), colour) in medians.iter().enumerate().zip(COLOURS) {
        let Some(median) = median else { continue };
        let width = (median / longest * BARS).max(1.0);
        let ratio = match row.ratio(column) {
            Some(ratio) if column > 0 => format!(" (×{})", number(ratio)),
            _ => String::new(),
        };
        body.push_str(&format!(
            "<rect x=\"{LABELS}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
             <text x=\"{:.0}\" y=\"{:.0}\" font-size=\"10\">{} {}{ratio}</text>\n",
            LABELS + width + 6.0,
            y + BAR - 2.0,
            number(*median),
            escape(&row.unit)
        ));
        y += BAR + 1.0;
    }
    y.max(top + BAR) + GAP
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

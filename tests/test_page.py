"""results/index.html as a user opens it: from disk, in a browser. Each test is one promise about the page."""

import json
import os
import pathlib
import re
import shutil
import time

import pytest
from PIL import Image

import scriptc
from fake_face.draw_faces import fill_folder

BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which controls the browser, is not installed")
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")

SIDE, PADDING = 16, 2


def read_run(folder):
    """The data that the folder's run.js gives to the page."""
    return json.loads(re.fullmatch(r"show\((.*)\);?\s*", (folder / "run.js").read_text(encoding="utf-8"), re.DOTALL)[1])


def write_run(folder, **changes):
    """Update run.js as a running training does: replace the whole file, with a new time."""
    run = read_run(folder) | {"updated": time.time()} | changes
    (folder / "run.js.new").write_text(f"show({json.dumps(run)});\n", encoding="utf-8")
    os.replace(folder / "run.js.new", folder / "run.js")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results folder of a real run of four epochs, each with its grid; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run")
    fill_folder(folder / "faces", 40, 32)
    flags = ["--image-size", SIDE, "--channels", 8, 16, "--batch-size", 16, "--sample-steps", 10, "--device", "cpu",
             "--dataroot", folder / "faces", "--results", folder / "results", "--checkpoint", folder / "checkpoint.pth"]
    for epochs in range(1, 5):  # a run always ends with a grid
        assert scriptc.main([str(flag) for flag in [*flags, "--epochs", epochs]]) == 0
    return folder / "results"


@pytest.fixture
def copied(results, tmp_path):
    return shutil.copytree(results, tmp_path / "results")


@pytest.fixture(scope="module")
def browser():
    unboxed = ["--no-sandbox"]  # Chromium's own sandbox refuses to run as root, as in most containers
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=BROWSER, args=unboxed) as browser:
        yield browser


@pytest.fixture
def look(browser):
    """A function that opens the page of a folder and waits for its first picture."""
    pages = []

    def open_page(folder, width=1280, waiting_for="#frame img", **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.errors, page.requests = [], []
        page.on("console", lambda message: page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        pages.append(page)
        page.goto((folder / "index.html").as_uri())
        page.wait_for_selector(waiting_for)
        return page

    yield open_page
    for page in pages:
        page.close()


def wait_for_grid(page, grid):
    epoch, step, name = grid
    page.wait_for_function("name => document.querySelector('#frame img')?.src.endsWith(name)", arg=name)
    assert page.inner_text("#moment") == f"Epoch {epoch}, step {step}"


def history(folder):
    run = read_run(folder)
    return [dict(zip(run["columns"], row)) for row in run["history"]]


def write_history(folder, rows, **changes):
    """Update run.js with other epochs, `rows` as history() returns them."""
    columns = [*history(folder)[0]]
    write_run(folder, columns=columns, history=[[row[column] for column in columns] for row in rows], **changes)


def write_distances(folder, distances):
    """Update run.js with other sample distances, one for each epoch; None for an epoch without a grid."""
    write_history(folder, [row | {"sample_distance": distance} for row, distance in zip(history(folder), distances)])


def figures(row):
    """The texts that show the values of an epoch."""
    distance = "–" if row["sample_distance"] is None else f"{row['sample_distance']:.2f}"
    return (f"training images {row['train_loss']:.4f}", f"held-out images {row['heldout_loss']:.4f}",
            f"samples of epoch {row['epoch']}: {distance}")


def shown_figures(page):
    return tuple(page.text_content(f"#{part}") for part in ("train", "held", "distance"))


def points(page, line):
    """Coordinates of the points of a line, (across, down) in pixels."""
    return [tuple(map(float, point.split(","))) for point in page.get_attribute(f"polyline.{line}", "points").split()]


# Content


def test_the_newest_grid_is_shown_large_and_sharp(results, look):
    page = look(results)
    wait_for_grid(page, read_run(results)["grids"][-1])
    shown = page.evaluate("(({naturalWidth, width}) => [naturalWidth, width])(document.querySelector('#frame img'))")
    assert shown[0] == 8 * (SIDE + PADDING) + PADDING and shown[1] >= 400 and shown[1] % shown[0] == 0
    assert page.eval_on_selector("#frame img", "image => getComputedStyle(image).imageRendering") == "pixelated"


def test_the_curve_has_a_point_for_every_epoch_on_both_lines(results, look):
    page = look(results)
    for kind in ("train", "held"):
        across = [x for x, _ in points(page, kind)]
        assert len(across) == len(history(results))
        assert across == sorted(across) and len(set(across)) == len(across)
    assert page.locator("#curve text").count() > 4


def test_the_distance_curve_has_points_only_at_measured_epochs_and_a_line_through_them(copied, look):
    write_distances(copied, [40.0, None, 12.0, 3.0])
    page = look(copied)
    epochs = [x for x, _ in points(page, "train")]
    assert [x for x, _ in points(page, "distance")] == [epochs[0], epochs[2], epochs[3]]
    assert page.locator("#distances circle").count() == 3


def test_the_distance_axis_is_logarithmic(copied, look):
    write_distances(copied, [1000.0, 100.0, 10.0, 1.0])
    downs = [y for _, y in points(look(copied), "distance")]
    steps = [after - before for before, after in zip(downs, downs[1:])]
    assert steps[0] > 20 and steps == pytest.approx([steps[0]] * 3, abs=0.2)


@pytest.mark.parametrize("distances", [(0.4, 0.5, 0.6, 0.7), (1.3, 1.2, 1.1, 1.0), (30, 20, 9, 4), (5000, 300, 20, 1.2)])
def test_a_dotted_line_at_distance_1_is_labelled_as_real_faces(copied, look, distances):
    write_distances(copied, distances)
    page = look(copied)
    height, labels = int(page.get_attribute("#distances", "height")), page.locator("#distances text").all_text_contents()
    at_1 = float(page.get_attribute("#distances line.real", "y1"))
    assert 0 < at_1 < height - 40 and {"real faces", "1"} <= set(labels)
    for distance, (_, down) in zip(distances, points(page, "distance")):
        assert 0 <= down <= height and (down > at_1 + 1) == (distance < 1) and (down < at_1 - 1) == (distance > 1)


def test_without_a_measured_distance_there_is_no_distance_curve(copied, look):
    write_distances(copied, [None] * 4)
    page = look(copied)
    assert page.is_visible("#curve") and not page.is_visible("#distances") and page.errors == []
    assert "Sample distance" not in page.inner_text("body")


def test_the_captions_say_how_overfitting_shows_and_which_distances_are_good(copied, look):
    write_distances(copied, [40.0, 20.0, 12.0, 3.0])
    text = " ".join(look(copied).inner_text("#curves").split())
    assert "If the error on held-out images rises away from the one on training images, the network overfits" in text
    assert "divided by its usual value for 64 real images. Lower is better." in text


def test_only_pictures_that_exist_are_shown(results, look):
    page = look(results)
    for name in ("denoising.png", "nearest.png", "samples.png", "morph.webp"):
        assert page.is_visible(f"#{pathlib.Path(name).stem}") == (name in read_run(results)["pictures"])
    page.wait_for_function("document.getElementById('denoising').naturalWidth > 0")


def test_captions_say_what_the_rows_of_the_strip_and_the_numbers_under_the_pairs_are(copied, look):
    write_run(copied, pictures=["denoising.png", "nearest.png"])
    page = look(copied)
    caption = page.inner_text("figure:has(#denoising)")
    assert all(words in caption for words in ("Each pair of rows is one sample", "noisy image xt", "clean image x0"))
    assert "Far below 1, the generated image is a copy" in page.inner_text("figure:has(#nearest)")


@pytest.fixture
def with_morph(copied):
    """A results folder with an animation as `scriptc.py --sample` leaves it."""
    first, *others = [Image.new("RGB", (544, 544), colour) for colour in ("red", "green", "blue")]
    first.save(copied / "morph.webp", save_all=True, append_images=others, duration=100, loop=0)
    write_run(copied, pictures=["denoising.png", "morph.webp"])
    return copied


@pytest.mark.parametrize("width", [390, 1280])
def test_the_animation_is_shown_as_wide_as_the_grid_with_a_caption(with_morph, look, width):
    page = look(with_morph, width=width)
    page.wait_for_function("document.getElementById('morph').naturalWidth > 0 && document.getElementById('morph').style.width")
    grid, shown = (page.locator(part).bounding_box()["width"] for part in ("#frame", "#morph"))
    assert 0.9 * grid <= shown <= grid + 0.1
    assert "from noise between theirs" in page.inner_text("figure:has(#morph)")


def test_the_animation_can_be_hidden(with_morph, look):
    page = look(with_morph)
    page.wait_for_selector("#morph")
    page.click("summary")
    page.wait_for_selector("#morph", state="hidden")


def test_people_who_prefer_reduced_motion_see_the_animation_only_on_request(with_morph, look):
    page = look(with_morph, reduced_motion="reduce")
    assert not page.is_visible("#morph") and page.is_visible("summary")
    page.focus("summary")
    page.keyboard.press("Enter")
    page.wait_for_selector("#morph")


def test_settings_state_and_progress_are_shown_as_text(copied, look):
    write_run(copied, state="training", progress=0.256, seconds_left=4000.0, images_per_second=1234.5)
    page = look(copied)
    assert page.inner_text("#state") == "Training: 25%, 1 h 6 min left"
    for label, text in read_run(copied)["settings"]:
        assert label in page.inner_text("#settings") and text in page.text_content("#settings")
    assert "1,235 images a second" in page.inner_text("#settings")


@pytest.mark.parametrize("path", ["/home/me/" + "long name/" * 12 + "faces", "C:\\Users\\" + "name\\" * 20 + "faces"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_long_path_is_cut_at_the_left_to_fit_in_one_line_and_is_whole_in_a_tooltip(copied, look, path, width):
    write_run(copied, settings=[["images", f"50 below {path}, 12 of them held out"], ["cache", "/a/b.bin, 614.4 MB"]])
    page = look(copied, width=width)
    assert page.locator("#settings dd").first.text_content() == f"50 below {path}, 12 of them held out"
    shown = page.get_by_title(path, exact=True)
    assert shown.bounding_box()["height"] < 30
    box, text = shown.evaluate("""shown => [shown, shown.firstChild].map(element => {
        const {left, right} = element.getBoundingClientRect(); return [left, right]})""")
    assert text[0] < box[0] and text[1] == pytest.approx(box[1], abs=1) and box[1] <= width
    box, text = page.get_by_title("/a/b.bin", exact=True).evaluate("shown => [shown.offsetWidth, shown.scrollWidth]")
    assert box == text


def test_a_training_without_updates_is_reported_as_stopped(copied, look):
    write_run(copied, state="training", progress=0.5, updated=time.time() - 1000)
    assert "seems to have stopped" in look(copied).inner_text("#state")


def test_new_samples_do_not_make_a_training_that_was_killed_look_alive(copied, look):
    write_run(copied, state="training", progress=0.5, updated=time.time() - 1000)
    scriptc.write_page(copied)
    assert "seems to have stopped" in look(copied).inner_text("#state")


def test_a_run_that_draws_pictures_for_many_minutes_is_reported_as_drawing(copied, look):
    write_run(copied, state="drawing", progress=0.429, seconds_left=4000.0, updated=time.time() - 1800)
    page = look(copied)
    assert page.inner_text("#state") == "Training: 42%, drawing pictures …"
    assert page.title() == "42% · fake_face" and page.errors == []


def test_a_drawing_without_an_update_for_more_than_an_hour_is_reported_as_stopped(copied, look):
    write_run(copied, state="drawing", progress=0.5, updated=time.time() - 4000)
    assert "seems to have stopped" in look(copied).inner_text("#state")


@pytest.mark.parametrize("epochs", [0, 1, 1000])
def test_runs_of_no_one_and_a_thousand_epochs_are_shown_without_errors(copied, look, epochs):
    losses = ("train_loss", "heldout_loss", "sample_distance")
    rows = [history(copied)[0] | {"epoch": epoch} | dict.fromkeys(losses, 3 / epoch) for epoch in range(1, epochs + 1)]
    write_history(copied, rows, grids=read_run(copied)["grids"][:epochs])
    page = look(copied, waiting_for="#seen")
    page.wait_for_timeout(200)
    assert page.locator("polyline").count() == (3 if epochs else 0) and page.errors == []
    assert page.is_visible("#controls") == (epochs > 1)


def test_text_in_the_data_stays_text(copied, look):
    write_run(copied, settings=[["device", "<img src=x onerror=alert(1)>"]])
    assert "<img src=x" in look(copied).inner_text("#settings")


def test_without_a_run_the_page_shows_the_command_to_start_one(copied, look):
    (copied / "run.js").unlink()
    page = look(copied, waiting_for="#hint")
    assert "python scriptc.py" in page.inner_text("#hint") and not page.is_visible("#seen")


def test_each_picture_file_and_the_metrics_have_a_link_if_they_exist(copied, look):
    grids, names = read_run(copied)["grids"], ["nearest.png", "loss.png", "progress.webp", "metrics.csv"]
    write_run(copied, pictures=names)
    page = look(copied)
    links = "links => links.map(link => [link.getAttribute('href'), link.textContent])"
    assert page.eval_on_selector_all("a", links) == [[name, name] for name in [grids[-1][2], *names]]
    page.keyboard.press("ArrowLeft")
    assert page.eval_on_selector_all("a", links)[0] == [grids[-2][2]] * 2


def test_a_link_keeps_the_keyboard_focus_when_the_page_updates_itself(copied, look):
    page = look(copied)
    page.focus("a[href='loss.png']")
    write_run(copied, state="training", progress=0.5, seconds_left=60)
    page.wait_for_function("document.getElementById('state').textContent.startsWith('Training')")
    assert page.evaluate("document.activeElement.textContent") == "loss.png"


# Controls


def test_slider_arrow_keys_and_button_change_the_picture(results, look):
    page, grids = look(results), read_run(results)["grids"]
    page.keyboard.press("ArrowLeft")
    wait_for_grid(page, grids[-2])
    page.fill("#slider", "0")
    wait_for_grid(page, grids[0])
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    wait_for_grid(page, grids[1])
    page.click("#newest")
    wait_for_grid(page, grids[-1])


def test_the_space_bar_plays_all_grids_from_the_first(results, look):
    page, grids = look(results), read_run(results)["grids"]
    page.evaluate("""window.shown = []; document.querySelector("#frame img").addEventListener(
                     "load", event => shown.push(event.target.src))""")
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_function("document.getElementById('play').textContent === 'Play'")
    wait_for_grid(page, grids[-1])
    assert [address.rpartition("/")[2] for address in page.evaluate("shown")] == [name for *_, name in grids]


@pytest.fixture
def with_distances(copied):
    """A results folder of four epochs, the second of them without a grid."""
    write_distances(copied, [40.0, None, 12.0, 3.0])
    return copied


@pytest.mark.parametrize("curve", ["#curve", "#distances"])
def test_values_of_an_epoch_on_both_curves_are_shown_under_the_pointer_on_either(with_distances, look, curve):
    page, rows = look(with_distances), history(with_distances)
    page.locator(curve).scroll_into_view_if_needed()
    box = page.locator(curve).bounding_box()
    for row, part in ((rows[0], 0.1), (rows[-1], 0.98)):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + 100)
        assert page.inner_text("#picked").startswith(f"Epoch {row['epoch']}, {row['images_seen']:,} images")
        assert shown_figures(page) == figures(row)
        assert [page.locator(f"{part} circle.picked").count() for part in ("#curve", "#distances")] == [2, 1]


def test_an_epoch_without_a_distance_shows_a_dash_for_it(with_distances, look):
    page, rows = look(with_distances), history(with_distances)
    page.focus("#curve")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown_figures(page) == figures(rows[1]) and page.inner_text("#distance") == "samples of epoch 2: –"
    assert page.locator("#distances circle.picked").count() == 0 and page.errors == []


def test_without_a_selected_epoch_the_newest_distance_is_shown_with_its_epoch(copied, look):
    write_distances(copied, [40.0, 12.0, 3.0, None])
    page = look(copied)
    assert page.inner_text("#picked").startswith("Epoch 4,") and page.inner_text("#distance") == "samples of epoch 3: 3.00"


@pytest.fixture
def phone(with_distances, look):
    page = look(with_distances, width=390, has_touch=True, is_mobile=True)
    page.locator("#curve").scroll_into_view_if_needed()
    return page


def swipe(page, start, end):
    """Move a finger over the curve; start and end are parts of its width and height."""
    box, fingers = page.locator("#curve").bounding_box(), page.context.new_cdp_session(page)
    for number in range(11):
        x, y = ((a + number / 10 * (b - a)) for a, b in zip(start, end))
        point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        fingers.send("Input.dispatchTouchEvent", {"type": "touchMove" if number else "touchStart", "touchPoints": [point]})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.mark.parametrize("curve", ["#curve", "#distances"])
def test_a_tap_on_a_curve_shows_the_values_of_the_epoch_there_and_its_grid(phone, with_distances, curve):
    phone.locator(curve).scroll_into_view_if_needed()
    box = phone.locator(curve).bounding_box()
    phone.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + 100)
    wait_for_grid(phone, read_run(with_distances)["grids"][0])
    assert shown_figures(phone) == figures(history(with_distances)[0])
    assert phone.locator("#curve circle.picked").count() == 2


@pytest.mark.parametrize("curve, line", [("#curve", "held"), ("#distances", "distance")])
def test_a_tap_on_a_point_of_a_line_shows_its_epoch_and_grid(phone, with_distances, curve, line):
    phone.locator(curve).scroll_into_view_if_needed()
    box, (across, down) = phone.locator(curve).bounding_box(), points(phone, line)[0]
    phone.touchscreen.tap(box["x"] + across, box["y"] + down)
    wait_for_grid(phone, read_run(with_distances)["grids"][0])
    assert shown_figures(phone) == figures(history(with_distances)[0])


def test_values_that_a_finger_drags_to_on_the_curve_stay_when_it_is_lifted(phone, with_distances):
    swipe(phone, (0.9, 0.5), (0.2, 0.5))
    phone.wait_for_function("document.querySelectorAll('#curve circle.picked').length === 2")
    assert shown_figures(phone) == figures(history(with_distances)[0])


def test_a_vertical_swipe_on_the_curve_scrolls_the_page_and_selects_no_epoch(phone):
    before = phone.evaluate("scrollY")
    swipe(phone, (0.5, 0.9), (0.5, 0.1))
    phone.wait_for_function("before => scrollY > before + 50", arg=before)
    assert phone.locator("#curve circle.picked").count() == 0


@pytest.mark.parametrize("curve", ["#curve", "#distances"])
def test_values_of_an_epoch_are_shown_to_the_keyboard_on_either_curve(with_distances, look, curve):
    page, rows = look(with_distances), history(with_distances)
    page.focus(curve)
    assert page.locator("#curve circle.picked").count() == 2 and shown_figures(page) == figures(rows[-1])
    page.keyboard.press("ArrowLeft")
    assert shown_figures(page) == figures(rows[-2])
    assert all(text in page.get_attribute(curve, "aria-valuetext") for text in figures(rows[-2]))
    assert page.get_attribute(curve, "aria-valuenow") == str(rows[-2]["epoch"])
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    wait_for_grid(page, read_run(with_distances)["grids"][0])


def test_the_keys_on_the_distance_curve_pass_over_epochs_without_a_distance(with_distances, look):
    page, rows = look(with_distances), history(with_distances)
    page.focus("#distances")
    page.keyboard.press("Home")
    for row in (rows[0], rows[2], rows[3], rows[3]):
        assert shown_figures(page) == figures(row)
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#moment").startswith("Epoch 4,")  # the grid is not moved by these keys


def test_an_enlarged_face_stays_enlarged_in_other_epochs(results, look):
    page, grids = look(results), read_run(results)["grids"]
    page.get_by_label("Face 10", exact=True).click()
    scale = "image => image.width / image.naturalWidth"
    assert page.eval_on_selector("#frame img", scale) > 20 and "face 10" in page.inner_text("#note")
    page.keyboard.press("ArrowLeft")
    wait_for_grid(page, grids[-2])
    assert page.eval_on_selector("#frame img", scale) > 20
    page.keyboard.press("Escape")
    assert page.eval_on_selector("#frame img", scale) < 10


# During a training


def add_epoch(folder):
    """Add one epoch with its grid, as a training does; returns the grid's entry."""
    run = read_run(folder)
    epoch, step, name = run["grids"][-1]
    grid = [epoch + 1, step + 5, f"epoch_{epoch + 1}_step_{step + 5}.png"]
    shutil.copy(folder / name, folder / grid[2])
    write_run(folder, state="training", grids=[*run["grids"], grid],
         history=[*run["history"], [grid[0], grid[1], *run["history"][-1][2:]]])
    return grid


def test_a_new_grid_appears_by_itself_unless_an_older_one_is_being_viewed(copied, look):
    at_newest, at_older = look(copied), look(copied)
    older = read_run(copied)["grids"][-2]
    at_older.keyboard.press("ArrowLeft")
    wait_for_grid(at_older, older)
    epochs = len(history(copied))
    newer = add_epoch(copied)
    for page in (at_newest, at_older):
        page.wait_for_function("n => document.querySelector('#curve polyline').points.length === n", arg=epochs + 1)
    wait_for_grid(at_newest, newer)
    wait_for_grid(at_older, older)


def test_an_open_page_shows_the_first_run_when_it_starts(copied, look):
    os.rename(copied / "run.js", copied / "later.js")
    page = look(copied, waiting_for="#hint")
    os.rename(copied / "later.js", copied / "run.js")
    page.wait_for_selector("#frame img")
    assert not page.is_visible("#hint")


# Network and layout


def test_the_page_loads_nothing_from_the_network_and_logs_no_errors(results, look):
    page = look(results)
    page.keyboard.press("Space")
    page.wait_for_timeout(500)
    here = results.as_uri() + "/"
    assert [url for url in page.requests if not url.startswith((here, "data:"))] == [] and page.errors == []
    assert any(url.startswith(here + "run.js") for url in page.requests)


@pytest.mark.parametrize("density", [1, 3])
@pytest.mark.parametrize("side", [SIDE, 64])
def test_on_a_phone_the_grid_takes_the_whole_width_of_the_screen(copied, look, side, density):
    write_run(copied, grid=read_run(copied)["grid"] | {"side": side})
    page = look(copied, width=390, device_scale_factor=density, is_mobile=True)
    for part in ("#frame", "#frame img"):
        box = page.locator(part).first.bounding_box()
        assert (box["x"], box["width"]) == (0, pytest.approx(390, abs=0.1))
    assert page.locator("#controls").bounding_box()["x"] >= 16
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_phone_and_its_colours(with_distances, look, scheme):
    page = look(with_distances, width=360, color_scheme=scheme, device_scale_factor=3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(page.locator(part).bounding_box()["width"] > 250
               for part in ("#frame", "#curve", "#distances", "#controls"))
    red, green, blue = map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))
    assert (red + green + blue > 600) == (scheme == "light")

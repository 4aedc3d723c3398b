// A map that the server colours: tiles of a pyramid whose finest px is the token of a tile, fetched where they are seen.

const MAX_TILES = 400;

/** A map of one channel. `about` is what the address of the slide's maps answered; `changed` is called as tiles come. */
export class TiledMap {
  constructor(about, channel, address, changed) {
    Object.assign(this, { about, channel, address, changed });
    this.tiles = new Map(); // in the order of their last use
    this.wanted = 0;
  }

  /** The level whose px are at least one px of the screen, or the coarsest one. */
  level(scale) {
    const finest = Math.ceil(Math.log2(1 / (this.about.px_lv0 * scale)));
    return Math.min(this.about.sizes.length - 1, Math.max(0, finest));
  }

  tile(level, column, row) {
    const key = `${level}/${column}_${row}`;
    let image = this.tiles.get(key);
    if (!image) {
      image = new Image();
      this.wanted += 1;
      image.onload = image.onerror = () => { this.wanted -= 1; this.changed(); };
      image.src = this.address(this.channel, key);
    }
    this.tiles.delete(key);
    this.tiles.set(key, image);
    if (this.tiles.size > MAX_TILES) this.tiles.delete(this.tiles.keys().next().value);
    return image;
  }

  /** Draw what is seen; `scale` is px of the screen per level-0 px, [width, height] the size of the canvas in them. */
  draw(context, [scale, left, top], [width, height]) {
    const { px_lv0: side, sizes } = this.about;
    context.beginPath(); // the last px of a coarse level may reach beyond the map
    context.rect(left, top, sizes[0][0] * side * scale, sizes[0][1] * side * scale);
    context.clip();
    const coarsest = sizes.length - 1;
    const wanted = this.level(scale);
    const complete = this.drawLevel(null, wanted, [scale, left, top], [width, height]);
    if (!complete && wanted !== coarsest) this.drawLevel(context, coarsest, [scale, left, top], [width, height]);
    if (complete || wanted === coarsest) this.drawLevel(context, wanted, [scale, left, top], [width, height]);
  }

  /** Draw a level, or without a context fetch it; true if all that is seen of it is there. */
  drawLevel(context, level, [scale, left, top], [width, height]) {
    const px = this.about.px_lv0 * 2 ** level * scale;
    const side = this.about.tile_px * px;
    const [columns, rows] = this.about.sizes[level].map((n) => Math.ceil(n / this.about.tile_px));
    let complete = true;
    for (let row = Math.max(0, Math.floor(-top / side)); row < rows && top + row * side < height; row += 1) {
      for (let column = Math.max(0, Math.floor(-left / side)); column < columns && left + column * side < width; column += 1) {
        const image = this.tile(level, column, row);
        if (!image.complete) complete = false;
        else if (context && image.naturalWidth) {
          context.drawImage(image, left + column * side, top + row * side, image.naturalWidth * px, image.naturalHeight * px);
        }
      }
    }
    return complete;
  }
}

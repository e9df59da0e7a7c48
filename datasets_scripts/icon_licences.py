"""The licences of the icon fonts, and which icons are brands: what a published page of the icons has to know."""

from __future__ import annotations

import re
from collections.abc import Sequence


# Authors and licence of each font, in the order of `icons.FONTS`, for a page that shows its drawings.
FONT_NOTICES = {
    "material_design": "Material Design Icons 6.9.96, the Pictogrammers community, pictogrammers.com, Apache-2.0",
    "phosphor": "Phosphor Icons 1.3.0, copyright Phosphor Icons, phosphoricons.com, MIT",
    "remix": "Remix Icon 2.5.0, copyright Remix Design, remixicon.com, Apache-2.0",
    "font_awesome": "Font Awesome 6.7.2 Free Solid, copyright Fonticons, fontawesome.com, SIL OFL 1.1",
    "codicons": "Codicons 0.0.36, copyright Microsoft Corporation, github.com/microsoft/vscode-codicons, CC BY 4.0",
    "elusive": "Elusive Icons 2.0, copyright Team Redux, elusiveicons.com, SIL OFL 1.1",
}
DRAWN = "The icons are drawings of these fonts' glyphs, made with Pillow: 64 x 64 pixels, fitted and centred."

# Words of names under which the fonts draw a brand's sign. Every name of the test split was read for them (there are
# 1,674 drawings); of the other splits, which no page shows, they are what is widely known.
BRANDS = frozenset(
    "500px adobe airbnb airtable alipay amazon android angular angularjs apple arch asana atlassian aws azure "
    "babel baidu bandcamp basecamp battlenet behance bilibili bing bitbucket bitcoin blender blogger bluetooth "
    "bootstrap centos chromecast cloudflare codepen codesandbox contactless cryengine debian delicious "
    "deviantart digg discord django docker douban dribbble droid dropbox drupal ebay elementor emby eslint "
    "ethereum evernote facebook fedora figma firebase firefox flattr flickr flutter fortran foursquare framer "
    "freebsd gatsby gentoo git github gitlab gmail gnome godaddy google graphql grav hackernews hbo hotjar houzz "
    "hubspot hulu humble icloud instagram instapaper invision iobroker java javascript jira jquery jsfiddle "
    "kakao kickstarter kodi kubernetes laravel lastfm linkedin linux lumx macbook mastercard mastodon meetup "
    "microsoft mixcloud monero mozilla myspace netease netflix nintendo nodejs npm npmjs nuxt onedrive onenote "
    "opera oss outlook pandora patreon paypal pinterest playstation plex polymer python qq raspberry react "
    "reddit redux rss ruby safari samsung sass shopify skype slack snapchat soundcloud spotify stackoverflow "
    "steam strava stripe stumbleupon svelte symfony tailwind telegram terraform tesla tiktok tinder tumblr "
    "twitch twitter typescript ubuntu umbraco unity unreal unsplash usb vhs viber vimeo visa vk vuejs vuetify "
    "wechat weibo whatsapp wikipedia windows word wordpress xbox xing yahoo yammer yelp youtube zhihu".split()
)
BRAND_NAMES = re.compile(r"\b(dev to|home assistant|keyboard control|material design|stack overflow)\b")


def is_brand(captions: Sequence[str]) -> bool:
    """Whether one of an icon's names is a brand's, whose sign its drawing may be: no font's licence gives that."""
    return any(BRANDS & set(caption.split()) or BRAND_NAMES.search(caption) for caption in captions)

"""Word lists shared by the task generators."""

from __future__ import annotations

NAMES: tuple[str, ...] = tuple(
    """Adam Alan Alice Amy Anna Arthur Ben Bella Bob Brian Carl Carol Chloe Clara Colin Dan David
    Dean Diana Dora
    Edgar Ella Emma Eric Eva Felix Fiona Frank Fred George Gina Grace Greg Hanna Harry Helen Henry
    Hugo Ida Ivan Ivy
    Jack Jane Jason Jean Jill Jim Joan John Judy Julia Karl Kate Keith Kim Kurt Lara Laura Leo Lily
    Linda Lisa Louis
    Lucy Luke Marc Maria Mark Martin Mary Max Mia Mike Mona Nadia Nancy Neil Nick Nina Nora Oliver
    Olga Oscar Otto
    Pam Paul Paula Peter Phil Rachel Ralph Rita Robert Roger Rosa Ruth Sam Sandra Sara Sean Simon
    Sofia Stella Steve
    Susan Ted Tess Theo Tim Tina Tom Tony Vera Victor Viola Walter Wanda Will Zoe""".split()
)
SURNAMES: tuple[str, ...] = tuple(
    """Abbott Archer Baker Barnes Bishop Black Brook Brown Butler Carter Clark Cole Cook Cooper
    Copper Cross Davis
    Drake Ellis Engine Fisher Fletcher Ford Foster Fox Frost Gardner Gibson Grant Gray Green Hall
    Harper Hill Holmes
    Hunt Jones Kelly King Knight Lake Lane Lewis Long Marsh Mason Miller Moore Morris Nash Nelson
    Owen Palmer Parker
    Perry Pierce Porter Potter Price Quinn Reed Rice Rivers Rose Ross Russell Sanders Scott Sharp
    Shaw Silver Stone
    Taylor Turner Wade Walker Ward Waters Webb Wells West White Wood Young""".split()
)
CITIES: tuple[str, ...] = tuple(
    """Athens Bergen Berlin Boston Brussels Cairo Chicago Cologne Cork Dallas Delhi Denver Dublin
    Essen Florence
    Geneva Ghent Glasgow Hamburg Helsinki Houston Istanbul Kyoto Leeds Lima Lisbon London Lyon
    Madrid Malmo Manila
    Miami Milan Montreal Moscow Munich Nairobi Naples Nice Osaka Oslo Oxford Paris Perth Porto
    Prague Quito Reno Riga
    Rome Seattle Seoul Seville Sofia Sydney Tokyo Toronto Turin Utrecht Venice Vienna Warsaw York
    Zurich""".split()
)
JOBS: tuple[str, ...] = tuple(
    """actor artist author baker banker barber builder butcher captain chef clerk coach dancer
    dentist doctor driver
    editor engineer farmer fisher florist gardener guard guide hunter judge lawyer librarian
    mechanic miner
    musician nurse painter pilot plumber poet porter postman priest sailor singer smith soldier
    surgeon tailor
    teacher trader waiter weaver writer""".split()
)
COLORS: tuple[str, ...] = tuple(
    "red blue green yellow black white orange purple brown pink gray silver golden violet".split()
)
OBJECTS: tuple[str, ...] = tuple(
    """ball basket bell book bottle box bowl brush bucket button camera candle card chair clock
    coat coin cup drum
    flag flute glass glove guitar hammer hat jar kettle key knife ladder lamp letter map mirror mug
    needle paper pen
    pencil phone plate radio ring rope scarf shoe spoon ticket towel toy umbrella vase watch
    whistle""".split()
)
ROOMS: tuple[str, ...] = tuple(
    """attic balcony bathroom bedroom cellar corridor garage garden hallway kitchen library office
    pantry park school
    shop stable street""".split()
)
THINGS: tuple[str, ...] = tuple(
    """apples balls books boxes cards coins cups eggs flowers keys lamps lemons marbles nuts
    oranges pears pencils
    pens plums rings shells stamps stones tickets toys""".split()
)
PETS: tuple[str, ...] = tuple(
    "cat dog parrot rabbit horse turtle hamster goat duck goose pony canary".split()
)
FOODS: tuple[str, ...] = tuple(
    """bread rice soup pasta cheese salad fish cake pizza honey beans noodles pancakes potatoes
    curry""".split()
)
WORDS: tuple[str, ...] = tuple(
    """air animal answer arm army bank bird boat body bone bread bridge brother butter cake canal
    cat castle cave
    chain chance child circle city cloud coal coast cold color corn cotton country cow cross crowd
    dance day desert
    dog door dream dress dust eagle earth east egg engine evening eye face family farm father
    feather field fire fish
    floor flower fog food foot forest fork friend frog fruit garden gate ghost gift girl gold grain
    grass hair hand
    harbor heart heat hill history home honey horse hour house ice island jewel journey juice king
    kitchen knee
    knot lake land language leaf leather light lion line market meadow meal metal milk mind money
    moon morning
    mother mountain mouse mouth music name night noise north ocean oil orange orchard ox paint
    palace party path peace
    pearl people picture pig plant pocket poem point pond prince queen question rain rabbit rice
    river road rock roof
    room root rose salt sand school sea season seed shadow sheep ship shirt shore sister skin sky
    sleep smoke snow
    soap song sound south spice spring stair star station steam steel stick stone storm story
    street sugar summer sun
    sword table tail tea temple tent thread thunder tiger time tower town trade train tree uncle
    valley village voice
    wagon wall water wave wax wheat wheel wind window wine winter wolf wood wool word world
    year""".split()
)
